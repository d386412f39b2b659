//! Every program against the running kernel's verifier, and what is said to kernels that are too old.

use std::path::PathBuf;

use culvert_proxy_daemon::intercept::{self, HostMode, Interception, InterceptionConfig};

fn version() -> (u32, u32) {
    let release = nix::sys::utsname::uname().expect("uname").release().to_string_lossy().into_owned();
    let mut numbers = release.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// The programs of the short cut, and the first kernels that have what they ask for: `bpf_get_netns_cookie` of a socket's events, and
/// `bpf_ktime_get_coarse_ns`. Before, they are not even tried: the short cut is off for the kernel's bugs, which is said at the
/// start, and hops use TCP.
const SHORT_CUT: [(&str, (u32, u32)); 2] = [("register_socket", (5, 15)), ("shortcut", (5, 11))];

#[test]
fn every_program_passes_the_verifier() {
    let refused = intercept::refused_programs().expect("the maps are made");
    println!("refused by {:?}: {refused:#?}", version());
    let mut names: Vec<&str> = refused.iter().map(|(name, _)| name.as_str()).collect();
    names.sort_unstable();
    let too_new: Vec<&str> = SHORT_CUT.iter().filter(|(_, since)| version() < *since).map(|(name, _)| *name).collect();
    let told = || refused.iter().map(|(name, why)| format!("{name}: {why}\n")).collect::<String>();
    assert_eq!(names, too_new, "{}", told());
}

#[test]
fn a_kernel_that_is_too_old_is_told_so() {
    let pin_path = PathBuf::from(format!("/sys/fs/bpf/culvert-programs-{}", std::process::id()));
    let config = InterceptionConfig {
        host: Some(HostMode::default()),
        pin_path: pin_path.clone(),
        ..InterceptionConfig::default()
    };
    match Interception::start(config, 1) {
        Ok(interception) => {
            assert!(version() >= (5, 14));
            interception.shutdown().expect("shuts down");
        }
        Err(error) => {
            assert!(version() < (5, 14), "{error}");
            let (words, lines) = (error.to_string(), error.to_string().lines().count());
            assert!(words.starts_with("interception needs Linux 5.14, and this is 5."), "{error}");
            assert_eq!(lines, 1, "{error}");
            assert!(!pin_path.exists(), "nothing is left");
        }
    }
}
