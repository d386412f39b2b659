//! The two ways to compile Rust for the kernel.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The release of bpf-linker that `setup` builds.
pub const BPF_LINKER_VERSION: &str = "0.13.0";
/// Where Debian's rustc-web puts the compiler; a rustup compiler comes first in most people's PATH.
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
/// What Debian's libstd-rust-web-dev-bpf brings.
const DEBIAN_BPF_CORE: &str = "/usr/lib/rustlib/bpfel-unknown-none/lib";

/// A compiler with a core library for the target `bpfel-unknown-none`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compiler {
    /// Debian's, whose core library for the target comes built.
    Debian,
    /// rustup's nightly, which builds the core library from its component rust-src.
    Nightly,
}

/// A compiler and a linker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Toolchain {
    /// The compiler.
    pub compiler: Compiler,
    /// The directory that holds bpf-linker.
    pub linker_dir: PathBuf,
}

impl Toolchain {
    /// Finds a complete one.
    pub fn find() -> Option<Self> {
        Some(Self { compiler: find_compiler()?, linker_dir: find_linker()? })
    }

    /// A `cargo` that builds for the kernel; arguments and environment of the build are the caller's.
    pub fn cargo(&self) -> Command {
        let mut command = Command::new("cargo");
        match self.compiler {
            // The bootstrap variable lets a stable compiler use the unstable features that aya-ebpf needs.
            Compiler::Debian => {
                command.env("RUSTC", DEBIAN_RUSTC).env("RUSTC_BOOTSTRAP", "1").arg("build");
            }
            Compiler::Nightly => {
                command.args(["+nightly", "build", "-Z", "build-std=core"]);
            }
        }
        // What cargo sets for the process that it runs (this one) would choose the compiler for it.
        for variable in ["RUSTUP_TOOLCHAIN", "CARGO", "RUSTC_WRAPPER", "RUSTFLAGS"] {
            command.env_remove(variable);
        }
        let mut path = self.linker_dir.clone().into_os_string();
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_else(|| OsString::from("/usr/bin:/bin")));
        command.env("PATH", path);
        command
    }
}

/// Finds a compiler.
pub fn find_compiler() -> Option<Compiler> {
    if Path::new(DEBIAN_RUSTC).exists() && Path::new(DEBIAN_BPF_CORE).exists() {
        return Some(Compiler::Debian);
    }
    let sysroot = Command::new("rustc").args(["+nightly", "--print", "sysroot"]).stderr(Stdio::null()).output().ok()?;
    let sysroot = String::from_utf8(sysroot.stdout).ok()?;
    let source = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core");
    (!sysroot.trim().is_empty() && source.exists()).then_some(Compiler::Nightly)
}

/// Finds the directory of a bpf-linker that runs: ours first, then any in PATH.
pub fn find_linker() -> Option<PathBuf> {
    let ours = tools_dir().map(|root| root.join("bin"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    ours.into_iter().chain(std::env::split_paths(&path)).find(|directory| {
        let linker = directory.join("bpf-linker");
        linker.exists()
            && Command::new(linker)
                .arg("--version")
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status()
                .is_ok_and(|status| status.success())
    })
}

/// Where tools are installed that belong to nobody but this project.
pub fn tools_dir() -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))?;
    Some(cache.join("culvert/tools"))
}
