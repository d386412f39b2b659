//! `culvert xds status`: what a proxy has of each resource, from its client status service.

mod rows;
mod table;

use std::{io::IsTerminal as _, time::Duration};

use anyhow::{Context, bail};
use clap::{Args, Subcommand, ValueEnum};
use envoy_types::pb::envoy::service::status::v3::{
    ClientStatusRequest, ClientStatusResponse,
    client_status_discovery_service_client::ClientStatusDiscoveryServiceClient,
};

use self::rows::{Row, State};
use crate::Outcome;

/// How long the proxy may take to answer.
const TIMEOUT: Duration = Duration::from_secs(30);
/// What `--check` exits with where something is rejected, incomplete or disconnected: an error of this program is 1, of its flags 2.
const REJECTED: u8 = 3;
/// What `--check` exits with where there is nothing that it could have looked at.
const NOTHING: u8 = 4;

const STATUS_HELP: &str = "\
States:
  serving    traffic obeys this version
  warming    accepted, and waiting for what it needs (endpoints, routes, secrets); nothing serves until then
  updating   a version serves, and its successor is warming
  incomplete serves without something that was refused or did not come: a secret (TLS handshakes that need it fail), routes
             (requests are answered 404) or endpoints (503), until it is there
  rejected   the newest version was refused; the version shown, if there is one, still serves. What cannot be shown with a
             resource has a line of its own, by the file's path or the server: a file or an answer of which nothing could be
             taken, and a response that was NACKed for its own faults (a name twice, a resource without a name), until
             one of that type is accepted
  requested  asked for by name, and the control plane has not sent it yet
  missing    asked for by name, and the control plane does not have it
  static     from the bootstrap
  connected, disconnected
             of a SOURCE, which is a control plane: it is shown with its transport as the version, since when that is
             so, and why there is no connection

VERSION is the version in which the resource last changed: a later one that brought the same bytes is accepted, and changes
nothing. AGE is the time since then.

Examples:
  culvert xds status                                what 127.0.0.1:9901 has
  culvert xds status --state rejected --wide        what was refused, with the whole reason
  culvert xds status --type cds --name 'users*'     some clusters
  culvert xds status --type lds --type rds          listeners and their routes
  culvert xds status --check || page-somebody       exits with 3 when anything is rejected or incomplete, or
                                                    a control plane gone, and with 4 when there is nothing
  culvert xds status --output json | jq '.[] | select(.state == \"requested\").name'";

/// The subcommands of `culvert xds`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show every resource that a proxy has of its control plane, and what became of it
    #[command(after_help = STATUS_HELP)]
    Status(Flags),
}

/// Flags of `culvert xds status`.
#[derive(Debug, Args)]
pub struct Flags {
    /// The admin address of culvertd
    #[arg(long, value_name = "URL", env = "CULVERT_ADMIN", default_value = "http://127.0.0.1:9901")]
    admin: String,

    /// Only this type: source, cds, eds, lds, rds, srds, vhds, sds, rtds, ecds, or a message's name such as Cluster; may be given
    /// several times
    #[arg(long = "type", value_name = "TYPE", value_parser = rows::known_type)]
    kinds: Vec<String>,

    /// Only resources of this name; `*` stands for any text
    #[arg(long, value_name = "PATTERN")]
    name: Option<String>,

    /// Only resources in this state
    #[arg(long)]
    state: Option<State>,

    /// How to print it
    #[arg(long, default_value = "text")]
    output: Output,

    /// Do not cut lines to the width of the terminal
    #[arg(long)]
    wide: bool,

    /// Exit with 3 when any of the resources shown is rejected or incomplete, or any of the sources shown disconnected; with 4 when
    /// the proxy has none of that type and name
    #[arg(long)]
    check: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// A table
    #[value(alias = "plain")]
    Text,
    /// An array with an object for each resource
    Json,
}

/// Runs a subcommand.
///
/// # Errors
/// When the proxy cannot be asked.
pub fn run(command: &Command) -> anyhow::Result<Outcome> {
    let Command::Status(flags) = command;
    let rows = rows::of(&fetch(&flags.admin)?);
    let rows: Vec<_> = rows.into_iter().filter(|row| is_meant(flags, row)).collect();
    let code = if flags.check { checked(flags, &rows) } else { 0 };
    let rows: Vec<_> = rows.into_iter().filter(|row| is_in_state(flags, row)).collect();
    let text = match flags.output {
        Output::Json => rows::json(&rows),
        Output::Text => {
            let terminal = std::io::stdout().is_terminal();
            let width = if flags.wide || !terminal { None } else { table::terminal_width() };
            let colours = terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
            table::text(&rows, std::time::SystemTime::now(), width, colours)
        }
    };
    Ok(Outcome { text, code })
}

/// What `--check` exits with, of the rows in whatever state. None of a state is what the operator hopes for, none at all is not.
fn checked(flags: &Flags, rows: &[Row]) -> u8 {
    let is_wrong = |row: &Row| matches!(row.state, State::Rejected | State::Incomplete | State::Disconnected);
    match rows {
        [] => NOTHING,
        rows if rows.iter().any(|row| is_in_state(flags, row) && is_wrong(row)) => REJECTED,
        _ => 0,
    }
}

/// Whether `--type` and `--name` choose the row.
fn is_meant(flags: &Flags, row: &Row) -> bool {
    (flags.kinds.is_empty() || flags.kinds.iter().any(|kind| rows::is_of_type(&row.type_url, kind)))
        && flags.name.as_deref().is_none_or(|pattern| rows::matches(pattern, &row.name))
}

/// Whether `--state` chooses the row.
fn is_in_state(flags: &Flags, row: &Row) -> bool {
    flags.state.is_none_or(|state| row.state == state)
}

fn fetch(admin: &str) -> anyhow::Result<ClientStatusResponse> {
    let url = if admin.contains("://") { admin.to_owned() } else { format!("http://{admin}") };
    if !url.starts_with("http://") {
        bail!("`{admin}` is not of the form http://HOST:PORT");
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start")?;
    let answer = async {
        let client = ClientStatusDiscoveryServiceClient::connect(url).await;
        let client = client.with_context(|| format!("cannot connect to {admin}; is that culvertd's admin address?"))?;
        // Without their content, ten thousand resources are some megabytes.
        let request = ClientStatusRequest { exclude_resource_contents: true, ..Default::default() };
        let answer = client.max_decoding_message_size(usize::MAX).fetch_client_status(request).await;
        Ok(answer.map_err(|status| no_answer(admin, &status))?.into_inner())
    };
    let answer = runtime.block_on(async { tokio::time::timeout(TIMEOUT, answer).await });
    answer.unwrap_or_else(|_| bail!("{admin} has not answered within {TIMEOUT:?}"))
}

/// Why there is no answer, for people.
fn no_answer(admin: &str, status: &tonic::Status) -> anyhow::Error {
    let (code, message) = (status.code(), status.message());
    // What is no gRPC at all: a page of Envoy's admin port, HTTP/1.1, the end of the connection.
    let is_no_grpc = std::error::Error::source(status).is_some() || message.contains("compression flag");
    if is_no_grpc || code == tonic::Code::Unimplemented {
        anyhow::anyhow!(
            "{admin} is not culvertd's admin address: something else answers there, which does not know of the client status \
             service (Envoy's admin port does not)"
        )
    } else {
        anyhow::anyhow!("{admin} does not say what it has; is it culvertd's admin address? ({code:?}: {message})")
    }
}

#[cfg(test)]
mod tests;
