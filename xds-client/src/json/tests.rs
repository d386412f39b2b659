use super::*;
use envoy_types::pb::envoy::config::bootstrap::v3::Bootstrap;
#[test]
fn x() {
    for f in std::env::var("FILES").unwrap().split_whitespace() {
        let t = std::fs::read_to_string(f).unwrap();
        let n = f.rsplit('/').next().unwrap();
        match from_yaml::<Bootstrap>(&t) {
            Err(e) => println!("{n}: {e}"),
            Ok(b) => match validate(&b) {
                Err(e) => println!("{n}: PGV {}", e.locate(&t)),
                Ok(()) => {
                    let again: Bootstrap = from_json(to_json(&b)).unwrap();
                    println!("{n}: ok {}", again == b);
                }
            },
        }
    }
}
