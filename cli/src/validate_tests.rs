use super::*;

fn flags(file: &Path, quiet: bool, output: Output) -> Flags {
    Flags { files: vec![file.to_owned()], quiet, output }
}

#[test]
fn what_is_deprecated_in_a_good_file_is_shown() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("a.yaml");
    let head = "node: {id: a, cluster: b}\ndynamic_resources:";
    fs::write(&file, format!("{head}\n  cds_config: {{path: {}}}\n", file.display())).unwrap();
    let place = "dynamic_resources.cds_config.path";
    let words = "the field is deprecated; write path_config_source instead";

    let Outcome { text, code } = run(&flags(&file, false, Output::Text)).unwrap();
    let name = file.display();
    assert_eq!(text, format!("{name}: warning: {place}: {words} (line 3, column 16)\n{name}: OK\n"));
    assert_eq!(code, 0);
    let text = run(&flags(&file, true, Output::Text)).unwrap().text;
    assert_eq!(text, format!("{name}: warning: {place}: {words} (line 3, column 16)\n"));
    let shown: serde_json::Value =
        serde_json::from_str(&run(&flags(&file, false, Output::Json)).unwrap().text).unwrap();
    let warning = json!({ "path": place, "line": 3, "column": 16, "message": words });
    assert_eq!(shown, json!([{ "file": file, "ok": true, "warnings": [warning] }]));

    fs::write(&file, "{}").unwrap();
    assert_eq!(run(&flags(&file, false, Output::Text)).unwrap().text, format!("{name}: OK\n"));
    assert_eq!(run(&flags(&file, true, Output::Text)).unwrap().text, "");
}

#[test]
fn files_of_resources_are_checked_by_resource() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("cds.yaml");
    let cluster =
        |more: &str| format!("- {{\"@type\": type.googleapis.com/envoy.config.cluster.v3.Cluster, name: a{more}}}\n");
    fs::write(&file, format!("resources:\n{}", cluster(""))).unwrap();
    let name = file.display();
    let Outcome { text, code } = run(&flags(directory.path(), false, Output::Text)).unwrap();
    assert_eq!((text.as_str(), code), (format!("{name}: OK\n").as_str(), 0));

    fs::write(&file, format!("resources:\n{}{}", cluster(""), cluster(", lrs_server: {self: {}}"))).unwrap();
    let Outcome { text, code } = run(&flags(directory.path(), false, Output::Text)).unwrap();
    let expected = format!("{name}: resources[1].lrs_server: not supported by culvert yet (line 3, column ");
    assert!(text.starts_with(&expected), "{text}");
    assert_eq!(code, REFUSED);
}
