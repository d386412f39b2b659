//! `culvert`: what a person types.

mod http;
mod overrides;
mod status;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Works with a Culvert mesh: makes and reads override headers, shows what discovery knows.
#[derive(Debug, Parser)]
#[command(name = "culvert", version)]
struct Flags {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make or read the header that sends one request's hops to offloaded revisions
    #[command(subcommand)]
    Override(overrides::Command),
    /// Show what culvert-discovery knows: clusters, services, endpoints, connected proxies
    Status(status::Flags),
}

fn main() -> ExitCode {
    let outcome = match Flags::parse().command {
        Command::Override(command) => overrides::run(command),
        Command::Status(flags) => status::run(&flags),
    };
    match outcome {
        Ok(text) => {
            use std::io::Write as _;
            // Whoever closed the pipe, such as `head`, has seen enough.
            let _ = std::io::stdout().write_all(text.as_bytes());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("culvert: {error:#}");
            ExitCode::FAILURE
        }
    }
}
