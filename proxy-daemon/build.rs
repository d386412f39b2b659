//! Puts the kernel programs, built beforehand by `cargo xtask build-ebpf`, where `intercept` includes them from.

use std::path::Path;
use std::{env, fs, process};

fn main() {
    let manifest_dir = env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    let out_dir = env::var_os("OUT_DIR").expect("cargo sets OUT_DIR");
    let object = Path::new(&manifest_dir).join("../target/bpf/culvert.bpf.o");
    println!("cargo::rerun-if-changed={}", object.display());
    if let Err(error) = fs::copy(&object, Path::new(&out_dir).join("culvert.bpf.o")) {
        if error.kind() == std::io::ErrorKind::NotFound {
            println!("cargo::error=kernel object not built: run `cargo xtask setup && cargo xtask build-ebpf`");
        } else {
            println!("cargo::error=cannot copy the kernel object {}: {error}", object.display());
        }
        process::exit(1);
    }
}
