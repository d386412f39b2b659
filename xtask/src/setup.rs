//! `cargo xtask setup`: finds what the other tasks need, and installs what is missing.

use std::io::{IsTerminal as _, Write as _};
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::progress;
use crate::toolchain::{self, BPF_LINKER_VERSION, Compiler};

/// Flags of `cargo xtask setup`.
#[derive(clap::Args)]
pub struct Args {
    /// Install without asking; assumed when CI=true.
    #[arg(long, short)]
    yes: bool,
    /// Also what `cargo xtask bench` compares with.
    #[arg(long)]
    bench: bool,
    /// Also what `cargo xtask vm-test` runs machines with.
    #[arg(long)]
    vm: bool,
}

/// Runs the task.
pub fn run(args: Args) -> Result<()> {
    let needs = Needs { bench: args.bench, vm: args.vm, ..Needs::TEST };
    ensure(args.yes, needs)?;
    eprintln!("all that is needed is installed");
    Ok(())
}

/// What a task needs. Every task needs the toolchain for the kernel programs.
#[derive(Clone, Copy, Debug)]
pub struct Needs {
    /// Programs for the lab: ip, socat, curl.
    lab: bool,
    /// cargo-nextest.
    nextest: bool,
    /// What the benchmark compares with, and its load generators.
    bench: bool,
    /// What runs virtual machines.
    vm: bool,
}

impl Needs {
    /// To build.
    pub const BUILD: Self = Self { lab: false, nextest: false, bench: false, vm: false };
    /// To run the demo.
    pub const DEMO: Self = Self { lab: true, ..Self::BUILD };
    /// To run the tests.
    pub const TEST: Self = Self { nextest: true, ..Self::DEMO };
    /// To run tests in virtual machines.
    pub const VM: Self = Self { vm: true, ..Self::DEMO };
    /// To run the benchmark.
    pub const BENCH: Self = Self { bench: true, ..Self::DEMO };
}

/// A thing to install.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    /// Debian packages, in one go.
    Packages(Vec<&'static str>),
    /// rustup's nightly toolchain with the core library's source.
    Nightly,
    /// bpf-linker, against Debian's LLVM or, for nightly, the one that it finds or brings.
    Linker(LinkerLlvm),
    /// cargo-nextest.
    Nextest,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum LinkerLlvm {
    Debian,
    Own,
}

/// A program (or the absolute path of a file) and the Debian package that has it.
const LAB: [(&str, &str); 3] = [("ip", "iproute2"), ("socat", "socat"), ("curl", "curl")];
const BENCH: [(&str, &str); 5] = [
    ("nginx", "nginx-light"),
    ("/usr/lib/nginx/modules/ngx_stream_module.so", "libnginx-mod-stream"),
    ("haproxy", "haproxy"),
    ("wrk", "wrk"),
    ("h2load", "nghttp2-client"),
];
/// What tests start besides the lab's programs.
const TESTS: [(&str, &str); 3] = [("redis-server", "redis-server"), ("chromium", "chromium"), ("nft", "nftables")];
/// What `cargo xtask vm-test` makes machines with.
const VM: [(&str, &str); 5] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("strip", "binutils"),
    ("xz", "xz-utils"),
    ("ldd", "libc-bin"),
    ("nft", "nftables"),
];
/// What brings the real Envoy, which tests and benchmark compare with (see envoy.rs).
const PIP: [(&str, &str); 1] = [("pip3", "python3-pip")];
/// Debian's compiler for the kernel programs.
const COMPILER_PACKAGES: [&str; 2] = ["rustc-web", "libstd-rust-web-dev-bpf"];
/// What bpf-linker is built from.
const LINKER_PACKAGES: [&str; 4] = ["llvm-22-dev", "zlib1g-dev", "libzstd-dev", "gcc"];
const DEBIAN_LLVM: &str = "/usr/lib/llvm-22";

/// Makes sure that what a task needs is there: says what is missing, asks (unless `yes`, or CI=true) and installs it.
/// Quick, and silent, when nothing is missing.
pub fn ensure(yes: bool, needs: Needs) -> Result<()> {
    let steps = missing(needs);
    if steps.is_empty() {
        return Ok(());
    }
    let debian = has_program("apt-get");
    eprintln!("missing:");
    for step in &steps {
        eprintln!("  {}", describe(step));
    }
    if steps.iter().any(|step| matches!(step, Step::Packages(_))) && !debian {
        bail!(
            "this is no Debian system (no apt-get): install the packages above by your system's means, then run again"
        );
    }
    if !yes && std::env::var_os("CI").is_none_or(|ci| ci != "true") && !confirmed()? {
        bail!("nothing was installed");
    }
    for step in &steps {
        install(step)?;
    }
    let left = missing(needs);
    if let Some(step) = left.first() {
        bail!("installed, but still not found: {}", describe(step));
    }
    Ok(())
}

fn missing(needs: Needs) -> Vec<Step> {
    let mut packages: Vec<&'static str> = Vec::new();
    let mut steps = Vec::new();
    let compiler = toolchain::find_compiler();
    let debian = has_program("apt-get");
    if compiler.is_none() {
        if debian {
            packages.extend(COMPILER_PACKAGES);
        } else {
            steps.push(Step::Nightly);
        }
    }
    if toolchain::find_linker().is_none() {
        if compiler == Some(Compiler::Nightly) || !debian {
            steps.push(Step::Linker(LinkerLlvm::Own));
        } else {
            if !Path::new(DEBIAN_LLVM).join("bin/llvm-config").exists() || !has_program("cc") {
                packages.extend(LINKER_PACKAGES);
            }
            steps.push(Step::Linker(LinkerLlvm::Debian));
        }
    }
    let lab = if needs.lab { LAB.as_slice() } else { &[] };
    let bench = if needs.bench { BENCH.as_slice() } else { &[] };
    let tests = if needs.nextest { TESTS.as_slice() } else { &[] };
    let vm = if needs.vm { VM.as_slice() } else { &[] };
    let pip = if needs.nextest || needs.bench { PIP.as_slice() } else { &[] };
    packages.extend(
        lab.iter()
            .chain(bench)
            .chain(tests)
            .chain(vm)
            .chain(pip)
            .filter(|(program, _)| !has_program(program))
            .map(|(_, package)| package),
    );
    if needs.nextest && !has_program("cargo-nextest") {
        steps.push(Step::Nextest);
    }
    if !packages.is_empty() {
        // First: the others build with them.
        steps.insert(0, Step::Packages(packages));
    }
    steps
}

fn describe(step: &Step) -> String {
    match step {
        Step::Packages(packages) => format!("Debian packages, by apt-get: {}", packages.join(" ")),
        Step::Nightly => "rustup's nightly toolchain with rust-src".to_owned(),
        Step::Linker(_) => match toolchain::tools_dir() {
            Some(directory) => {
                format!("bpf-linker {BPF_LINKER_VERSION}, built into {} (about two minutes)", directory.display())
            }
            None => format!("bpf-linker {BPF_LINKER_VERSION}; set HOME, so that there is a place for it"),
        },
        Step::Nextest => "cargo-nextest, by cargo install (a few minutes)".to_owned(),
    }
}

fn confirmed() -> Result<bool> {
    if !std::io::stdin().is_terminal() {
        bail!("not asked, because standard input is no terminal: run `cargo xtask setup --yes` to install these");
    }
    eprint!("install them? [Y/n] ");
    std::io::stderr().flush()?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer).context("cannot read the answer")?;
    Ok(matches!(answer.trim().to_ascii_lowercase().as_str(), "" | "y" | "yes"))
}

fn install(step: &Step) -> Result<()> {
    match step {
        Step::Packages(packages) => {
            progress::run("updating apt's package lists", as_root("apt-get")?.args(["update", "--quiet"]))?;
            let mut apt = as_root("apt-get")?;
            apt.args(["install", "--yes", "--quiet", "--no-install-recommends"]).args(packages);
            progress::run("installing Debian packages", &mut apt)
        }
        Step::Nightly => {
            let mut rustup = Command::new("rustup");
            rustup.args(["toolchain", "install", "nightly", "--profile", "minimal", "--component", "rust-src"]);
            progress::run("installing the nightly toolchain", &mut rustup)
        }
        Step::Linker(llvm) => {
            let root = toolchain::tools_dir().context("HOME is not set: there is no place to install bpf-linker in")?;
            let mut cargo = cargo_install();
            cargo.args(["bpf-linker", "--version", BPF_LINKER_VERSION, "--root"]).arg(root);
            if *llvm == LinkerLlvm::Debian {
                cargo.args(["--no-default-features", "--features", "llvm-22"]).env("LLVM_PREFIX", DEBIAN_LLVM);
            }
            progress::run("building bpf-linker", &mut cargo)
        }
        Step::Nextest => progress::run("building cargo-nextest", cargo_install().arg("cargo-nextest")),
    }
}

fn cargo_install() -> Command {
    let mut cargo = Command::new("cargo");
    cargo.args(["install", "--locked"]);
    cargo
}

/// A command that runs as root: plainly if this process does, else by sudo.
fn as_root(program: &str) -> Result<Command> {
    // SAFETY: reads the process's own user id.
    if unsafe { libc::geteuid() } == 0 {
        let mut command = Command::new(program);
        command.env("DEBIAN_FRONTEND", "noninteractive");
        return Ok(command);
    }
    if !has_program("sudo") {
        bail!("installing packages needs root, and there is no sudo: run `cargo xtask setup` as root");
    }
    let mut command = Command::new("sudo");
    command.args(["DEBIAN_FRONTEND=noninteractive", program]);
    Ok(command)
}

/// Whether a program is in PATH, or where daemons are (which is not in everyone's PATH).
fn has_program(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(Into::into))
        .any(|directory| directory.join(name).is_file())
}
