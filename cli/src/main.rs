//! `culvert`: what a person types.

mod acceleration;
mod clean;
mod cluster;
mod enroll;
mod http;
mod manifest;
mod overrides;
mod pods;
mod services;
mod status;
mod table;
mod validate;
mod xds;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Works with a Culvert mesh: makes and reads override headers, shows what discovery knows and what a proxy has.
#[derive(Debug, Parser)]
#[command(name = "culvert", version)]
struct Flags {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Say how far payload between a node's pods may go past TCP, until its daemon ends
    #[command(after_help = acceleration::HELP)]
    Acceleration(acceleration::Flags),
    /// Take a cluster out of the mesh, and back in
    #[command(subcommand, after_help = cluster::HELP)]
    Cluster(cluster::Command),
    /// Show a service's endpoints, as culvert-discovery knows them
    #[command(after_help = services::ENDPOINTS_HELP)]
    Endpoints(services::EndpointsFlags),
    /// Check ServiceManifests, and show what they become
    #[command(subcommand)]
    Manifest(manifest::Command),
    /// Make or read the header that sends one request's hops to offloaded revisions
    #[command(subcommand)]
    Override(overrides::Command),
    /// Show the services of the mesh, as culvert-discovery knows them
    #[command(after_help = services::SERVICES_HELP)]
    Services(services::ServicesFlags),
    /// Have a node's daemon intercept a pod
    #[command(after_help = enroll::HELP)]
    Enroll(enroll::Flags),
    /// Have a node's daemon leave a pod alone that was enrolled by command
    Unenroll(enroll::UnenrollFlags),
    /// Remove what a daemon that was killed left on this node
    #[command(after_help = clean::HELP)]
    Clean(clean::Flags),
    /// Show what culvert-discovery knows: clusters, services, endpoints, connected proxies; with --node, a node's pods
    Status(pods::StatusFlags),
    /// Check bootstrap files, as `culvertd --mode validate` does
    #[command(after_help = validate::HELP)]
    Validate(validate::Flags),
    /// Show what a proxy has of its control plane
    #[command(subcommand)]
    Xds(xds::Command),
}

/// What a command leaves behind.
#[derive(Debug)]
pub struct Outcome {
    /// What is printed.
    text: String,
    /// What the program exits with.
    code: u8,
}

impl From<String> for Outcome {
    fn from(text: String) -> Outcome {
        Outcome { text, code: 0 }
    }
}

fn main() -> ExitCode {
    let outcome = match Flags::parse().command {
        Command::Acceleration(flags) => acceleration::run(&flags).map(Outcome::from),
        Command::Cluster(command) => cluster::run(&command),
        Command::Endpoints(flags) => services::endpoints(&flags).map(Outcome::from),
        Command::Manifest(command) => manifest::run(&command),
        Command::Override(command) => overrides::run(command).map(Outcome::from),
        Command::Services(flags) => services::services(&flags).map(Outcome::from),
        Command::Enroll(flags) => enroll::enroll(&flags).map(Outcome::from),
        Command::Unenroll(flags) => enroll::unenroll(&flags).map(Outcome::from),
        Command::Clean(flags) => clean::run(&flags).map(Outcome::from),
        Command::Status(flags) => pods::run(&flags).map(Outcome::from),
        Command::Validate(flags) => validate::run(&flags),
        Command::Xds(command) => xds::run(&command),
    };
    match outcome {
        Ok(Outcome { text, code }) => {
            use std::io::Write as _;
            // Whoever closed the pipe, such as `head`, has seen enough.
            let _ = std::io::stdout().write_all(text.as_bytes());
            ExitCode::from(code)
        }
        Err(error) => {
            eprintln!("culvert: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_flags_of_all_commands_fit_together() {
        super::Flags::command().debug_assert();
    }
}
