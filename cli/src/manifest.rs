//! `culvert manifest`: checks service manifests, and shows what they become.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use clap::{Args, Subcommand};
use culvert_discovery::policy::files::{self, is_manifest};
use culvert_discovery::resources::Role;
use culvert_xds_client::json::ConfigError;

use crate::Outcome;

/// What the program exits with where a file is refused: an error of this program is 1, of its flags 2.
const REFUSED: u8 = 3;

const CHECK_HELP: &str = "\
Of each document the faults are shown, with line, column and field. Of a directory the files that culvert-discovery would read are
looked at: *.yaml, *.yml and *.json directly in it. Exits with 0 when every file is good, with 3 when one
is refused. A warning is of something that is well formed and cannot hold: the file is good.

Examples:
  culvert manifest check users.yaml
  culvert manifest check manifests/";

const RENDER_HELP: &str = "\
The output is what culvert-discovery makes of the file for a culvertd: a file of Envoy resources, which `culvert validate` reads.
A service whose Service is not in the file is taken to have the port 80, an edge proxy to listen to 8080.

Examples:
  culvert manifest render users.yaml > resources.yaml && culvert validate resources.yaml
  culvert manifest render --proxy edge users.yaml";

/// The subcommands of `culvert manifest`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Say what is wrong with files of ServiceManifests and other manifests
    #[command(after_help = CHECK_HELP)]
    Check(CheckFlags),
    /// Show the clusters, listeners and routes that a file's ServiceManifests become
    #[command(after_help = RENDER_HELP)]
    Render(RenderFlags),
}

/// Flags of `culvert manifest check`.
#[derive(Debug, Args)]
pub struct CheckFlags {
    /// Files of manifests, YAML or JSON, or directories of them
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
}

/// Flags of `culvert manifest render`.
#[derive(Debug, Args)]
pub struct RenderFlags {
    /// A file of manifests, YAML or JSON, or a directory of them
    #[arg(value_name = "FILE")]
    file: PathBuf,

    /// For which proxy: a node's, a sidecar of pods of the file's services, or one at the edge
    #[arg(long, value_name = "node|sidecar|edge", default_value_t)]
    proxy: Role,
}

/// Runs a subcommand.
///
/// # Errors
/// When a file cannot be read.
pub fn run(command: &Command) -> anyhow::Result<Outcome> {
    match command {
        Command::Check(flags) => check(&flags.files),
        Command::Render(flags) => render(&flags.file, flags.proxy),
    }
}

fn check(paths: &[PathBuf]) -> anyhow::Result<Outcome> {
    let (mut text, mut code) = (String::new(), 0);
    for path in files_of(paths)? {
        match files::check(&read(&path)?) {
            Ok((objects, warnings)) => {
                for warning in warnings {
                    text.push_str(&format!("{}: warning: {warning}\n", path.display()));
                }
                text.push_str(&format!("{}: OK, {} with policy\n", path.display(), objects.manifests.len()));
            }
            Err(faults) => {
                text.push_str(&faults_of(&path, &faults));
                code = REFUSED;
            }
        }
    }
    Ok(Outcome { text, code })
}

/// The files that are meant, those of directories in the order of their names.
fn files_of(paths: &[PathBuf]) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in paths {
        if !path.is_dir() {
            files.push(path.clone());
            continue;
        }
        let read = std::fs::read_dir(path).and_then(|entries| entries.map(|it| Ok(it?.path())).collect());
        let mut found: Vec<PathBuf> = read.with_context(|| format!("cannot read {}", path.display()))?;
        found.retain(|path| is_manifest(path));
        ensure!(!found.is_empty(), "{} has no *.yaml, *.yml or *.json", path.display());
        found.sort();
        files.extend(found);
    }
    Ok(files)
}

fn render(path: &Path, proxy: Role) -> anyhow::Result<Outcome> {
    let mut texts = Vec::new();
    for file in files_of(&[path.to_owned()])? {
        let text = read(&file)?;
        // So that faults have their own file's name and lines.
        if let Err(faults) = files::check(&text) {
            eprint!("{}", faults_of(&file, &faults));
            return Ok(Outcome { text: String::new(), code: REFUSED });
        }
        texts.push(text);
    }
    Ok(match files::render(&texts.join("\n---\n"), proxy) {
        Ok(resources) => Outcome::from(serde_saphyr::to_string(&resources)?),
        Err(faults) => {
            // Not among what another program is to read.
            eprint!("{}", faults_of(path, &faults));
            Outcome { text: String::new(), code: REFUSED }
        }
    })
}

fn read(path: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// A line a fault: `FILE:LINE:COLUMN: FIELD: what is wrong`.
fn faults_of(path: &Path, faults: &[ConfigError]) -> String {
    let line = |fault: &ConfigError| {
        let place = fault.position.map_or_else(String::new, |(line, column)| format!("{line}:{column}:"));
        let field = if fault.path.is_empty() { String::new() } else { format!("{}: ", fault.path) };
        format!("{}:{place} {field}{}\n", path.display(), fault.message)
    };
    faults.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "
apiVersion: culvert.dev/v1alpha1
kind: ServiceManifest
metadata: {name: users}
spec:
  protocol: grpc
  timeouts: {connect: 250ms, request: 0s, idle: 2m}
  retries: {attempts: 3, retryOn: [unavailable, connect-failure], perTryTimeout: 500ms}
  circuitBreakers: {maxConnections: 10, maxPendingRequests: 20, maxRequests: 30, maxRetries: 4}
  outlierDetection: {consecutive5xx: 7, interval: 5s, baseEjectionTime: 10s, maxEjectionPercent: 50}
  rateLimit: {requests: 100, per: 1s, burst: 200}
  healthCheck: {interval: 5s, timeout: 1s}
  egress: [orders, payments.shop]
";

    fn file(directory: &tempfile::TempDir, name: &str, text: &str) -> PathBuf {
        let path = directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    #[test]
    fn each_fault_is_a_line_with_its_place() {
        let directory = tempfile::tempdir().unwrap();
        let good = file(&directory, "good.yaml", GOOD);
        let bad = file(&directory, "bad.yaml", &GOOD.replace("maxRetries: 4", "maxRetries: -4"));
        let Outcome { text, code } = check(&[good.clone(), bad.clone()]).unwrap();
        assert_eq!(code, REFUSED);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], format!("{}: OK, 1 with policy", good.display()));
        let place = format!("{}:9:82: spec.circuitBreakers.maxRetries: ", bad.display());
        assert!(lines[1].starts_with(&place) && lines[1].ends_with("(ServiceManifest default/users)"), "{text}");
        assert_eq!(check(std::slice::from_ref(&good)).unwrap().code, 0);
        // A directory: what discovery would read of it.
        file(&directory, ".hidden.yaml", "kind: [");
        file(&directory, "notes.txt", "kind: [");
        assert_eq!(check(&[directory.path().to_owned()]).unwrap().text, lines[1].to_owned() + "\n" + lines[0] + "\n");
        let empty = tempfile::tempdir().unwrap();
        assert!(check(&[empty.path().to_owned()]).unwrap_err().to_string().ends_with("has no *.yaml, *.yml or *.json"));
        let error = format!("{:#}", check(&[directory.path().join("none.yaml")]).unwrap_err());
        assert!(error.contains("cannot read") && error.contains("none.yaml"), "{error}");
    }

    /// That what a manifest has is in the definition that the API server goes by, which refuses or drops what is not.
    fn assert_defined(value: &serde_json::Value, schema: &serde_json::Value, path: &str) {
        assert!(schema.is_object(), "{path} is not in servicemanifests.yaml");
        for (name, field) in value.as_object().into_iter().flatten() {
            assert_defined(field, &schema["properties"][name], &format!("{path}.{name}"));
        }
        for item in value.as_array().into_iter().flatten() {
            assert_defined(item, &schema["items"], &format!("{path}[]"));
        }
    }

    /// Readers copy them.
    #[test]
    fn manifests_in_the_docs_are_good() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let definition = read(&root.join("deploy/kubernetes/servicemanifests.yaml")).unwrap();
        let definition: serde_json::Value = serde_saphyr::from_str(&definition).unwrap();
        let version = &definition["spec"]["versions"][0];
        let spec = &version["schema"]["openAPIV3Schema"]["properties"]["spec"];
        let api_version =
            format!("{}/{}", definition["spec"]["group"].as_str().unwrap(), version["name"].as_str().unwrap());
        let directory = tempfile::tempdir().unwrap();
        let mut found = Vec::new();
        for entry in std::fs::read_dir(root.join("docs")).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            // Fences are at odd places; those in a list are indented with what they hold.
            for block in read(&path).unwrap().split("```").skip(1).step_by(2) {
                let Some(block) = block.strip_prefix("yaml\n").filter(|it| it.contains("kind: ServiceManifest")) else {
                    continue;
                };
                let Outcome { text, code } = check(&[file(&directory, "block.yaml", block)]).unwrap();
                assert!(code == 0 && text.ends_with(" OK, 1 with policy\n"), "{name}: {text}{block}");
                let manifest: serde_json::Value = serde_saphyr::from_str(block).unwrap();
                assert_eq!(manifest["apiVersion"], *api_version, "{name}: {block}");
                assert_defined(&manifest["spec"], spec, "spec");
                found.push(name.clone());
            }
        }
        assert_eq!(found, ["discovery.md"; 2]);
        // One of a version that there is not does not pass for something that is somebody else's.
        let later = file(&directory, "later.yaml", &GOOD.replace("v1alpha1", "v1"));
        let Outcome { text, code } = check(&[later]).unwrap();
        let expected =
            "there is no kind ServiceManifest of culvert.dev/v1; culvert has ServiceManifest of culvert.dev/v1alpha1";
        assert!(code == REFUSED && text.contains(expected), "{text}");
    }

    /// What is rendered is what a culvertd takes: all of it, or this fails.
    #[test]
    fn what_is_rendered_is_accepted_by_the_daemon() {
        let directory = tempfile::tempdir().unwrap();
        let tcp = GOOD.replace("name: users", "name: db").replace("grpc", "tcp").replace("rateLimit", "# rateLimit");
        let http = GOOD.replace("name: users", "name: web").replace("grpc", "http");
        let http = http.replace("unavailable", "5xx").replace("healthCheck: {", "healthCheck: {path: /healthz, ");
        let http = http + "  edge: {domains: [shop.example, '*.shop.example'], prefix: /web}\n";
        let path = file(&directory, "all.yaml", &format!("{GOOD}---{tcp}---{http}"));
        for (proxy, shown) in [
            (Role::Node, "max_ejection_percent: 50"),
            (Role::Sidecar, "name: inbound_db.default:80"),
            (Role::Edge, "path_separated_prefix: /web"),
        ] {
            let Outcome { text, code } = render(&path, proxy).unwrap();
            assert_eq!(code, 0);
            assert!(text.contains("web.default:80") && text.contains(shown), "{text}");
            let rendered = file(&directory, "resources.yaml", &text);
            let verdict = culvert_proxy_daemon::bootstrap::validate(&rendered);
            assert!(verdict.as_ref().is_ok_and(Vec::is_empty), "{verdict:?}\n{text}");
        }
        let refused = file(&directory, "refused.yaml", &GOOD.replace("grpc", "quic"));
        assert_eq!(render(&refused, Role::Node).unwrap().code, REFUSED);
        // A directory is what its files are together.
        assert_eq!(render(directory.path(), Role::Node).unwrap().code, REFUSED);
        let several = tempfile::tempdir().unwrap();
        file(&several, "a.yaml", GOOD);
        file(&several, "b.yaml", &http);
        let Outcome { text, code } = render(several.path(), Role::Node).unwrap();
        assert!(code == 0 && text.contains("users.default:80") && text.contains("web.default:80"), "{text}");
    }
}
