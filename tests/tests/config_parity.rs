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
const NOT_SUPPORTED: &[(&str, &str)] = &[];

/// Files on which the verdicts differ on purpose, and why.
const DIFFERENT: &[(&str, &str)] = &[];

/// Files that the real Envoy does not survive: culvertd must refuse them, in bounded time and memory.
const NOT_FOR_ENVOY: &[(&str, &str)] = &[];

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
    let expected_line = if ours.good {
        ours.output == format!("configuration '{}' OK\n", path.display())
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
