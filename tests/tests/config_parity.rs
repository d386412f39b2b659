//! culvertd and the real Envoy judge the same files: `tests/corpus/valid` holds what Envoy takes, `tests/corpus/broken` what it
//! refuses. culvertd must agree on each, except for the files listed here.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, bail, ensure};
use culvert_tests::binaries::{binary, envoy};

/// Files that Envoy takes and that use a feature which Culvert lacks, each with the field that culvertd must name. A file
/// that is taken by now must leave the list.
const NOT_SUPPORTED: &[(&str, &str)] = &[
    (
        "valid/endpoints/health_status_number_unknown.yaml",
        "static_resources.clusters[0].load_assignment.endpoints[0].lb_endpoints[0].health_status",
    ),
    ("valid/enums/no_rule_undefined_number.yaml", "static_resources.listeners[0].traffic_direction"),
    (
        "valid/hcm/no_filters.yaml",
        "static_resources.listeners[0].filter_chains[0].filters[0].typed_config.http_filters",
    ),
    (
        "valid/headers/add_raw_value.yaml",
        "static_resources.listeners[0].filter_chains[0].filters[0].typed_config.route_config.request_headers_to_add[0].header.raw_value",
    ),
    ("valid/listeners/address_v6_scope.yaml", "static_resources.listeners[0].address.socket_address.address"),
    ("valid/listeners/use_original_dst_false.yaml", "static_resources.listeners[0].use_original_dst"),
    ("valid/network_filters/empty_chain.yaml", "static_resources.listeners[0].filter_chains[0].filters"),
    ("valid/network_filters/none.yaml", "static_resources.listeners[0].filter_chains[0].filters"),
    ("valid/not_supported/bootstrap_header_prefix.yaml", "header_prefix"),
    ("valid/not_supported/bootstrap_stats_sinks.yaml", "stats_sinks"),
    (
        "valid/not_supported/http_filter_lua.yaml",
        "static_resources.listeners[0].filter_chains[0].filters[0].typed_config.http_filters[0].typed_config",
    ),
    ("valid/not_supported/listener_socket_options.yaml", "static_resources.listeners[0].socket_options"),
    (
        "valid/not_supported/network_filter_redis.yaml",
        "static_resources.listeners[0].filter_chains[0].filters[0].typed_config",
    ),
    ("valid/unknown_fields/listener_config_v1.yaml", "static_resources.listeners[0].use_original_dst"),
    ("valid/sources/authorities_in_source.yaml", "dynamic_resources.cds_config.authorities"),
    ("valid/sources/config_sources.yaml", "config_sources"),
    ("valid/sources/default_config_source.yaml", "default_config_source"),
    (
        "valid/sources/google_grpc_credentials.yaml",
        "dynamic_resources.cds_config.api_config_source.grpc_services[0].google_grpc.channel_credentials",
    ),
    ("valid/sources/node_context_params.yaml", "node_context_params"),
];

/// Files on which the verdicts differ on purpose, and why.
const DIFFERENT: &[(&str, &str)] = &[
    ("broken/access_log/unwritable.yaml", "log files are opened when the daemon starts, not when a file is checked"),
    (
        "broken/routes/regex_repeat_1000.yaml",
        "Envoy refuses what RE2 compiles to more than 100 instructions; here 1 MiB is the limit, and matching takes linear time anyway",
    ),
    ("valid/clusters/original_dst_header_bad.yaml", "no header can have this name"),
    ("valid/headers/add_name_bad.yaml", "no header can have this name"),
    ("valid/headers/add_value_control.yaml", "a header's value cannot hold this"),
    ("valid/headers/remove_bad.yaml", "no header can have this name"),
    (
        "valid/limits/nested_objects_60.yaml",
        "messages are nested at most 100 deep, as where Envoy reads them from the wire; each level of a Struct is three",
    ),
    ("valid/listeners/name_twice.yaml", "the second listener would silently replace the first"),
    ("valid/routes/cluster_header_bad.yaml", "no header can have this name: the route could never work"),
    ("valid/routes/header_name_bad.yaml", "no header can have this name: the match could never be"),
    ("valid/routes/redirect_port_70000.yaml", "there is no such port"),
    ("valid/routes/regex_any_byte.yaml", "\\C matches half of a character"),
    ("valid/yaml/not_utf8.yaml", "text that is not UTF-8 cannot be a protobuf string"),
    ("valid/yaml/nul_byte.yaml", "YAML has no NUL"),
    ("valid/yaml/unclosed_quote.yaml", "a file that ends inside a quoted text was cut off"),
    ("valid/sources/hds_rest.yaml", "Envoy looks at this when it starts, not when a file is checked"),
    ("valid/sources/lds_path_missing.yaml", "Envoy looks at this when it starts, not when a file is checked"),
    ("valid/sources/lds_self.yaml", "Envoy looks at this when it starts, not when a file is checked"),
    ("valid/sources/lrs_rest.yaml", "Envoy looks at this when it starts, not when a file is checked"),
    ("valid/sources/rds_no_name.yaml", "nothing can be asked for by an empty name"),
    ("valid/sources/rtds_no_name.yaml", "nothing can be asked for by an empty name"),
    ("valid/sources/xdstp_lds_locator_bad.yaml", "there can be no resource of this name"),
    ("valid/tls/upstream_sni_longest.yaml", "a label of a DNS name has at most 63 bytes"),
    ("valid/sources/srds_no_rds_source.yaml", "the routes that a scope names could not be had"),
];

/// Files that the real Envoy does not survive: culvertd must refuse them, in bounded time and memory.
const NOT_FOR_ENVOY: &[(&str, &str)] = &[
    ("broken/limits/alias_bomb.yaml", "Envoy needs gigabytes"),
    ("broken/limits/alias_of_itself.yaml", "Envoy crashes"),
];

const REFUSAL: &str = "not supported by culvert yet";

/// Processes at a time.
const WORKERS: usize = 2;

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus")
}

/// All files below `dir`, as paths relative to `root`, in order.
fn files(dir: &Path, root: &Path, found: &mut BTreeSet<String>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            files(&path, root, found)?;
        } else {
            found.insert(path.strip_prefix(root)?.to_str().context("a file name is not UTF-8")?.to_owned());
        }
    }
    Ok(())
}

/// What a program said to one file.
struct Verdict {
    good: bool,
    output: String,
}

fn judge(program: &Path, file: &Path, quiet: &[&str]) -> Result<Verdict> {
    let output = Command::new(program)
        .args(["--mode", "validate", "-c"])
        .arg(file)
        .args(quiet)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("running {}", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    match output.status.code() {
        Some(0) => Ok(Verdict { good: true, output: text }),
        Some(1) => Ok(Verdict { good: false, output: text }),
        _ => bail!("{} on {}: {}: {text}", program.display(), file.display(), output.status),
    }
}

fn listed<'a>(table: &'a [(&str, &str)], file: &str) -> Option<&'a str> {
    table.iter().find(|(name, _)| *name == file).map(|(_, what)| *what)
}

/// What is wrong with the verdicts on one file.
fn complaint(culvertd: &Path, envoy: Option<&Path>, file: &str) -> Result<Option<String>> {
    let path = corpus().join(file);
    let good = file.starts_with("valid/");
    if let Some(envoy) = envoy.filter(|_| listed(NOT_FOR_ENVOY, file).is_none()) {
        let found = judge(envoy, &path, &["-l", "error"])?;
        if found.good != good {
            return Ok(Some(format!("it is in the wrong folder, Envoy says: {}", found.output)));
        }
    }
    let ours = judge(culvertd, &path, &[])?;
    if ours.output.contains("panicked") {
        return Ok(Some(format!("culvertd panicked: {}", ours.output)));
    }
    // Warnings, on standard error, come after it.
    let expected_line = if ours.good {
        ours.output.starts_with(&format!("configuration '{}' OK\n", path.display()))
    } else {
        ours.output.lines().last().is_some_and(|line| line.starts_with(&format!("culvertd: {}: ", path.display())))
    };
    if !expected_line {
        return Ok(Some(format!("culvertd does not say it as expected: {}", ours.output)));
    }
    if let Some(field) = listed(NOT_SUPPORTED, file) {
        let refused = !ours.good
            && ours.output.contains(&format!("{field}: "))
            && ours.output.contains(REFUSAL)
            && !ours.output.contains("invalid");
        return Ok((!refused).then(|| format!("culvertd must refuse {field} as {REFUSAL}, and says: {}", ours.output)));
    }
    let different = listed(DIFFERENT, file).is_some();
    if different == (ours.good != good) {
        return Ok(None);
    }
    let problem = if different { "the verdicts agree by now: take it off the list" } else { "the verdicts differ" };
    Ok(Some(format!("{problem}; culvertd says: {}", ours.output)))
}

#[test]
fn culvertd_judges_as_envoy_does() -> Result<()> {
    let mut corpus_files = BTreeSet::new();
    for folder in ["valid", "broken"] {
        files(&corpus().join(folder), &corpus(), &mut corpus_files)?;
    }
    for (file, _) in NOT_SUPPORTED.iter().chain(DIFFERENT).chain(NOT_FOR_ENVOY) {
        ensure!(corpus_files.contains(*file), "{file} is listed and does not exist");
    }
    let envoy = match envoy() {
        Ok(path) => Some(path),
        Err(error) if std::env::var_os("CI").is_some_and(|ci| ci == "true") => return Err(error),
        Err(error) => {
            println!("culvertd is compared with the folders' names only: {error:#}");
            None
        }
    };
    let culvertd = binary("culvertd")?;
    let files: Vec<String> = corpus_files.into_iter().collect();
    let (next, complaints) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                while let Some(file) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let found = complaint(&culvertd, envoy.as_deref(), file);
                    if let Some(text) = found.unwrap_or_else(|error| Some(format!("{error:#}"))) {
                        complaints.lock().expect("nothing panics with the lock held").push(format!("{file}: {text}"));
                    }
                }
            });
        }
    });
    let complaints = complaints.into_inner().expect("nothing panics with the lock held");
    ensure!(complaints.is_empty(), "{} of {} files:\n{}", complaints.len(), files.len(), complaints.join("\n"));
    Ok(())
}
