//! `cargo xtask vm-test`: the tests of the kernel programs on Debian's kernels, in virtual machines.

mod initramfs;
mod kernels;

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::build_ebpf::{self, workspace_root};
use crate::progress;
use crate::setup::{self, Needs};
use initramfs::Initramfs;
use kernels::{Kernel, Series};

/// Flags of `cargo xtask vm-test`.
#[derive(clap::Args)]
pub struct Args {
    /// Also Linux 5.10, 6.18 and the newest that Debian has.
    #[arg(long)]
    all: bool,
    /// Only kernels whose release begins with this.
    #[arg(long)]
    kernel: Option<String>,
    /// Only test binaries whose name contains this.
    #[arg(long)]
    binary: Option<String>,
    /// How many machines run at a time; each has one processor.
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// How many seconds a machine may take.
    #[arg(long, default_value_t = 1200)]
    limit: u64,
    /// Show what the machines print.
    #[arg(long, short)]
    verbose: bool,
    /// Install what is missing without asking; assumed when CI=true.
    #[arg(long, short)]
    yes: bool,
    /// Handed to the test binaries: names of tests.
    #[arg(last = true)]
    tests: Vec<String>,
}

const DEFAULT: [Series; 2] = [Series::Of(6, 1), Series::Of(6, 12)];
const ALL: [Series; 5] = [Series::Of(5, 10), Series::Of(6, 1), Series::Of(6, 12), Series::Of(6, 18), Series::Newest];

/// Test binaries, and the first kernel that each is for.
const BINARIES: [(&str, Version); 16] = [
    ("kernel_programs", (5, 10, 0)),
    // Interception needs SO_NETNS_COOKIE.
    ("kernel_redirect", (5, 14, 0)),
    ("kernel_inbound", (5, 14, 0)),
    ("kernel_host", (5, 14, 0)),
    ("kernel_balance", (5, 14, 0)),
    ("kernel_bridge", (5, 14, 0)),
    // They look at TCX links, or replace daemons without a gap.
    ("kernel_lifecycle", (6, 6, 0)),
    ("kernel_enrol", (6, 6, 0)),
    ("kernel_upgrade", (6, 6, 0)),
    ("kernel_succession", (6, 6, 0)),
    ("kernel_departed", (5, 14, 0)),
    ("kernel_pods_watch", (5, 14, 0)),
    ("kernel_coexistence", (5, 14, 0)),
    ("kernel_complaints", (5, 14, 0)),
    ("kernel_shortcut", (6, 1, 0)),
    ("kernel_sessions", (6, 1, 0)),
];

/// Tests that are left out everywhere: because they are the parts that other tests' processes play, because what they need is not
/// in the machine, or because an emulated processor takes minutes for them, or longer than they allow.
const LEFT_OUT: [&str; 6] = [
    "play_the_",
    "a_full_map_is_an_error",
    "mark_of_interception",
    "many_short_connections_lose_nothing",
    "a_restart_takes_less_than_a_second",
    "every_complaint_has_a_test",
];

/// Tests that are left out below a kernel: they give packets to programs that they find by TCX.
const LEFT_OUT_BELOW: [(&str, Version); 3] = [
    ("resets_are_well_formed", (6, 6, 0)),
    ("odd_packets_pass_unchanged", (6, 6, 0)),
    ("packets_for_the_daemon_are_addressed_to_the_port", (6, 6, 0)),
];

/// Test binaries, and tests, that are left out where the short cut is off.
const NEED_SHORT_CUT: [&str; 4] = [
    "kernel_shortcut",
    "kernel_sessions",
    "sockets_are_registered_again_after_a_restart",
    "what_workers_count_goes_on_after_a_crash",
];

/// Series whose sockmap had known bugs, and the first release of each without; below the last one others have them too. As in
/// `proxy-daemon/src/intercept/probe.rs`.
const SHORT_CUT: [Version; 4] = [(6, 1, 183), (6, 6, 152), (6, 12, 104), (6, 18, 42)];

/// Whether the short cut is on with a kernel.
fn has_short_cut(version: Version) -> bool {
    match SHORT_CUT.iter().find(|floor| (floor.0, floor.1) == (version.0, version.1)) {
        Some(floor) => version >= *floor,
        None => SHORT_CUT.last().is_some_and(|newest| version > *newest),
    }
}

/// Major and minor number, and patch; of kernels whose release does not tell it, 0.
type Version = (u32, u32, u32);

/// Programs that the tests run.
const PROGRAMS: [&str; 4] = ["ip", "tc", "nft", "nsenter"];

/// The daemon, which some of the tests run: it is at the place in the machine that they were built with.
const DAEMON: &str = "target/debug/culvertd";

/// Runs the task.
pub fn run(args: &Args) -> Result<()> {
    setup::ensure(args.yes, Needs::VM)?;
    build_ebpf::ensure()?;
    let root = workspace_root();
    let mut kernels = kernels::ensure(&root, if args.all { &ALL } else { &DEFAULT })?;
    if let Some(prefix) = &args.kernel {
        kernels.retain(|kernel| kernel.release.starts_with(prefix.as_str()));
    }
    ensure!(!kernels.is_empty(), "no kernel has such a release");
    ensure!(BINARIES.iter().any(|(name, _)| args.wants(name)), "no test binary has such a name");
    let built = build(&root, args)?;

    let next = AtomicUsize::new(0);
    let failures = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..args.jobs.max(1) {
            scope.spawn(|| {
                while let Some(kernel) = kernels.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(error) = run_on(kernel, &built, args, &root) {
                        eprintln!("{}: FAILED: {error:#}", kernel.release);
                        failures.lock().unwrap_or_else(|it| it.into_inner()).push(kernel.release.clone());
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap_or_else(|it| it.into_inner());
    if failures.is_empty() {
        return Ok(());
    }
    bail!("failed on {}; what the machines printed is in target/vm/<release>.log", failures.join(", "));
}

/// What the machines run.
struct Built {
    init: PathBuf,
    /// By name.
    tests: Vec<(String, PathBuf)>,
}

impl Args {
    /// Whether a test binary is to be run at all.
    fn wants(&self, name: &str) -> bool {
        self.binary.as_ref().is_none_or(|part| name.contains(part.as_str()))
    }
}

fn build(root: &Path, args: &Args) -> Result<Built> {
    let mut init = Command::new("cargo");
    init.args(["build", "--quiet", "--workspace", "--bin", "vm-init", "--bin", "culvertd"]).current_dir(root);
    progress::run("building the machines' first process, and the daemon", &mut init)?;
    eprintln!("building the tests of the kernel programs ...");
    let mut cargo = Command::new("cargo");
    // With the features of the whole workspace, so that what is built is what other builds built.
    cargo.args(["test", "--no-run", "--quiet", "--workspace", "--message-format=json"]);
    let wanted = BINARIES.iter().map(|(name, _)| *name).filter(|name| args.wants(name));
    cargo.args(wanted.flat_map(|name| ["--test", name])).current_dir(root);
    let output = cargo.stderr(Stdio::inherit()).output().context("running cargo")?;
    ensure!(output.status.success(), "the tests cannot be built");
    let mut tests = Vec::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let Ok(message) = serde_json::from_str::<serde_json::Value>(line) else { continue };
        let (name, path) = (message["target"]["name"].as_str(), message["executable"].as_str());
        if let (Some(name), Some(path)) = (name, path)
            && name.starts_with("kernel_")
        {
            tests.push((name.to_owned(), PathBuf::from(path)));
        }
    }
    Ok(Built { init: root.join("target/debug/vm-init"), tests })
}

/// Boots a kernel, and judges what came of it.
fn run_on(kernel: &Kernel, built: &Built, args: &Args, root: &Path) -> Result<()> {
    let directory = root.join("target/vm");
    let scratch = directory.join(format!("scratch-{}", kernel.release));
    fs::create_dir_all(&scratch)?;
    let mut archive = Initramfs::new();
    archive.program("init", &built.init, &scratch)?;
    for program in PROGRAMS {
        archive.program(&format!("bin/{program}"), &find_program(program)?, &scratch)?;
    }
    let mut list = String::new();
    for (name, contents) in kernel.modules()? {
        archive.file(&format!("modules/{name}.ko"), &contents);
        list.push_str(&format!("/modules/{name}.ko\n"));
    }
    archive.file("modules.list", list.as_bytes());
    let mut plan = String::new();
    let mut planned = 0;
    let lacking: &[&str] = if has_short_cut(kernel.version()) { &[] } else { &NEED_SHORT_CUT };
    for (name, path) in &built.tests {
        let new_enough = BINARIES.iter().any(|(known, first)| known == name && kernel.version() >= *first);
        let left_out = lacking.contains(&name.as_str());
        if !new_enough || left_out || !args.wants(name) {
            continue;
        }
        archive.program(&format!("tests/{name}"), path, &scratch)?;
        plan.push_str(&format!("/tests/{name}\t--test-threads=1"));
        let too_new = LEFT_OUT_BELOW.iter().filter(|(_, first)| kernel.version() < *first).map(|(test, _)| test);
        LEFT_OUT.iter().chain(too_new).chain(lacking).for_each(|test| plan.push_str(&format!("\t--skip\t{test}")));
        args.tests.iter().for_each(|test| plan.push_str(&format!("\t{test}")));
        plan.push('\n');
        planned += 1;
    }
    ensure!(planned > 0, "no test binary is for this kernel");
    if plan.contains("kernel_sessions") {
        let daemon = root.join(DAEMON);
        archive.program(daemon.to_string_lossy().trim_start_matches('/'), &daemon, &scratch)?;
    }
    archive.file("plan", plan.as_bytes());
    let initramfs = scratch.join("initramfs.cpio");
    let archive = archive.finish();
    // While it is unpacked it is there twice.
    let memory = 1024 + archive.len() * 2 / (1024 * 1024);
    fs::write(&initramfs, archive)?;

    let began = Instant::now();
    eprintln!("{}: starts", kernel.release);
    let outcome = boot(kernel, &initramfs, memory, args, &directory.join(format!("{}.log", kernel.release)));
    // It is large, and quickly made again.
    let _ = fs::remove_dir_all(&scratch);
    let passed = judge(&outcome?, planned)?;
    eprintln!("{}: {passed} tests passed in {:.0} s", kernel.release, began.elapsed().as_secs_f32());
    Ok(())
}

/// What a machine did.
struct Outcome {
    /// qemu's exit code; `None`: it was killed, here because it took too long.
    code: Option<i32>,
    lines: Vec<String>,
}

/// `memory`: in MiB.
fn boot(kernel: &Kernel, initramfs: &Path, memory: usize, args: &Args, log: &Path) -> Result<Outcome> {
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        // /dev/kvm may be there and not work.
        .args(["-accel", "tcg", "-M", "pc", "-cpu", "max", "-smp", "1", "-serial", "stdio"])
        .args(["-m", &memory.to_string()])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x04"])
        .arg("-kernel")
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(initramfs)
        .args([
            "-append",
            "console=ttyS0 loglevel=3 panic=-1 oops=panic nokaslr mitigations=off no_timer_check tsc=reliable \
             random.trust_cpu=on 8250.nr_uarts=1",
        ]);
    let child = qemu.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
    let mut child = Machine(child.context("running qemu-system-x86_64")?);
    let output = child.0.stdout.take().context("qemu has no output")?;
    let (prefix, verbose) = (kernel.release.clone(), args.verbose);
    let reader = std::thread::spawn(move || {
        let mut lines = Vec::new();
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            if verbose || line.starts_with("test ") || line.starts_with("VM-TEST") || line.contains("panicked at") {
                eprintln!("{prefix}: {line}");
            }
            lines.push(line);
        }
        lines
    });
    let began = Instant::now();
    let code = loop {
        if let Some(status) = child.0.try_wait()? {
            break status.code();
        }
        if began.elapsed() > Duration::from_secs(args.limit) {
            eprintln!("{}: takes more than {} s: given up", kernel.release, args.limit);
            break None;
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    drop(child);
    let lines = reader.join().unwrap_or_default();
    fs::write(log, lines.join("\n")).with_context(|| format!("writing {}", log.display()))?;
    Ok(Outcome { code, lines })
}

/// Killed when it is dropped.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// How many tests passed. The machine's word counts only if its last line and qemu's exit code agree: a kernel that panics
/// ends qemu as a reboot does. And a binary that ran no test has proved nothing.
fn judge(outcome: &Outcome, planned: usize) -> Result<usize> {
    let marker = outcome.lines.iter().rev().find_map(|line| line.strip_prefix("VM-EXIT ")?.parse::<i32>().ok());
    match (outcome.code, marker) {
        (None, _) => bail!("it took too long"),
        (Some(code), Some(marker)) if code == marker * 2 + 1 => ensure!(marker == 0, "tests failed"),
        (code, marker) => bail!("the machine died (qemu's exit code {code:?}, the last word {marker:?})"),
    }
    let mut passed = Vec::new();
    for line in outcome.lines.iter().filter_map(|line| line.strip_prefix("test result: ok. ")) {
        passed.push(line.split(' ').next().and_then(|number| number.parse::<usize>().ok()).unwrap_or(0));
    }
    ensure!(passed.len() == planned, "{} of {planned} test binaries told a result", passed.len());
    ensure!(passed.iter().all(|number| *number > 0), "a test binary ran 0 tests: {passed:?}");
    Ok(passed.iter().sum())
}

fn find_program(name: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut candidates = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    candidates
        .find_map(|directory| Some(directory.join(name)).filter(|path| path.is_file()))
        .with_context(|| format!("no program {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(code: Option<i32>, lines: &[&str]) -> Outcome {
        Outcome { code, lines: lines.iter().map(|line| (*line).to_owned()).collect() }
    }

    #[test]
    fn the_short_cut_is_tested_where_it_is_on() {
        let off = [(5, 10, 0), (6, 1, 0), (6, 8, 12), (6, 12, 103), (6, 18, 15)];
        let on = [(6, 1, 183), (6, 12, 117), (6, 18, 42), (6, 19, 0), (7, 3, 4)];
        assert!(off.into_iter().all(|version| !has_short_cut(version)));
        assert!(on.into_iter().all(has_short_cut));
    }

    #[test]
    fn only_agreement_is_believed() {
        const PASSED: &str = "test result: ok. 3 passed; 0 failed; 0 ignored";
        const NONE: &str = "test result: ok. 0 passed; 0 failed; 9 filtered out";
        assert_eq!(judge(&outcome(Some(1), &[PASSED, "VM-EXIT 0"]), 1).unwrap(), 3);
        for (code, lines, words) in [
            // The guest panicked: qemu reboots, which ends it with 0.
            (Some(0), &[PASSED][..], "died"),
            (Some(0), &[PASSED, "VM-EXIT 0"], "died"),
            (Some(1), &[PASSED], "died"),
            (Some(3), &[PASSED, "VM-EXIT 0"], "died"),
            (Some(3), &[PASSED, "VM-EXIT 1"], "tests failed"),
            (None, &[PASSED, "VM-EXIT 0"], "too long"),
            (Some(1), &[NONE, "VM-EXIT 0"], "0 tests"),
            (Some(1), &["VM-EXIT 0"], "0 of 1"),
        ] {
            let error = judge(&outcome(code, lines), 1).unwrap_err().to_string();
            assert!(error.contains(words), "{code:?} {lines:?}: {error}");
        }
    }
}
