//! Culvert's developer tasks. `cargo xtask --help` lists them.

mod bench;
mod build_ebpf;
mod demo;
mod envoy;
mod peers;
mod progress;
mod setup;
mod test;
mod toolchain;
mod vm_test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Culvert's developer tasks.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Finds what the other tasks need, and installs what is missing.
    Setup(setup::Args),
    /// Builds the kernel programs to target/bpf/culvert.bpf.o.
    BuildEbpf(build_ebpf::Args),
    /// Shows the main job end to end in a lab of network namespaces.
    Demo(demo::Args),
    /// Runs every test.
    Test(test::Args),
    /// Runs the tests of the kernel programs on Debian's kernels, in virtual machines.
    VmTest(vm_test::Args),
    /// Compares CPU per request with Envoy, HAProxy and nginx.
    Bench(bench::Args),
}

fn main() -> ExitCode {
    let result = match Cli::parse().task {
        Task::Setup(args) => setup::run(args),
        Task::BuildEbpf(args) => build_ebpf::run(args),
        Task::Demo(args) => demo::run(args),
        Task::Test(args) => test::run(args),
        Task::VmTest(args) => vm_test::run(&args),
        Task::Bench(args) => bench::run(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
