//! `culvert validate`: the verdict of `culvertd --mode validate`, for any number of files.
//!
//! It is the daemon's own code, linked in: the same verdict by construction, in one process for all files, and on machines
//! that have no daemon.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use culvert_proxy_daemon::bootstrap;
use culvert_xds_client::json::ConfigError;
use serde_json::json;

use crate::Outcome;

/// The warnings of a good file, or why it is refused.
type Verdict = Result<Vec<ConfigError>, bootstrap::LoadError>;

/// What the program exits with where a file is refused: an error of this program is 1, of its flags 2.
const REFUSED: u8 = 3;

/// How deep directories are looked into.
const MAX_DEPTH: usize = 32;

/// Shown after the flags' help.
pub const HELP: &str = "\
Directories are searched for files that end in .yaml, .yml or .json. As in Envoy, a file that does not end in .yaml or .yml
is read as JSON. A file with a list of `resources` is one that path_config_source names: each resource of it is checked.

Exits with 0 when every file is good, with 3 when one is refused. A deprecated field is a warning: the file is good.

Examples:
  culvert validate bootstrap.yaml
  culvert validate deploy/ --quiet                  only what is wrong
  culvert validate -o json deploy/ | jq '.[] | select(.ok | not)'";

/// Flags of `culvert validate`.
#[derive(Debug, Args)]
pub struct Flags {
    /// Bootstrap files and files of resources, or directories of them
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,

    /// Say nothing of files that are good and have no warning
    #[arg(long, short)]
    quiet: bool,

    /// How to print
    #[arg(long, short, value_enum, default_value_t = Output::Text)]
    output: Output,
}

/// Output formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// A line a file
    Text,
    /// A list of objects: file, ok, for a refused one path, line, column, message, and for a good one its warnings, if any
    Json,
}

/// Runs the command.
pub fn run(flags: &Flags) -> anyhow::Result<Outcome> {
    let mut files = Vec::new();
    for path in &flags.files {
        if path.is_dir() {
            let before = files.len();
            search(path, 0, &mut files)?;
            if files.len() == before {
                bail!("{}: no file in it ends in .yaml, .yml or .json", path.display());
            }
        } else {
            files.push(path.clone());
        }
    }
    let verdicts: Vec<_> = files.iter().map(|file| (file, bootstrap::validate(file))).collect();
    let code = if verdicts.iter().all(|(_, verdict)| verdict.is_ok()) { 0 } else { REFUSED };
    let worth_a_word = |verdict: &Verdict| verdict.as_ref().map_or(true, |warnings| !warnings.is_empty());
    let shown = verdicts.iter().filter(|(_, verdict)| !flags.quiet || worth_a_word(verdict));
    let text = match flags.output {
        Output::Text => shown
            .map(|(file, verdict)| match verdict {
                Ok(warnings) => {
                    let warnings = warnings.iter().map(|warning| format!("{}: warning: {warning}\n", file.display()));
                    let ok = (!flags.quiet).then(|| format!("{}: OK\n", file.display()));
                    warnings.chain(ok).collect()
                }
                Err(error) => format!("{error}\n"),
            })
            .collect(),
        Output::Json => {
            let objects = shown.map(|(file, verdict)| match verdict {
                Ok(warnings) => {
                    let mut object = json!({ "file": file, "ok": true });
                    if !warnings.is_empty() {
                        object["warnings"] = warnings.iter().map(place).collect();
                    }
                    object
                }
                Err(refused) => {
                    let mut object = place(&refused.error);
                    object["file"] = json!(file);
                    object["ok"] = json!(false);
                    object
                }
            });
            let list = serde_json::Value::Array(objects.collect());
            serde_json::to_string_pretty(&list)? + "\n"
        }
    };
    Ok(Outcome { text, code })
}

/// What is wrong where, as an object.
fn place(error: &ConfigError) -> serde_json::Value {
    json!({
        "path": error.path,
        "line": error.position.map(|(line, _)| line),
        "column": error.position.map(|(_, column)| column),
        "message": error.message,
    })
}

/// Adds the configuration files below `dir`, in order.
fn search(dir: &Path, depth: usize, files: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    if depth > MAX_DEPTH {
        bail!("{}: more than {MAX_DEPTH} directories in each other", dir.display());
    }
    let entries = fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
    let mut entries = entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<Vec<_>, _>>()?;
    entries.sort();
    for path in entries {
        if path.is_dir() {
            search(&path, depth + 1, files)?;
        } else if path.extension().is_some_and(|end| end == "yaml" || end == "yml" || end == "json") {
            files.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "validate_tests.rs"]
mod tests;
