//! The lab's service as a program; see `culvert_tests::app`.

use std::net::{SocketAddr, TcpListener};

use anyhow::{Context, Result};
use clap::Parser;
use culvert_tests::app::App;

/// An ordinary HTTP/1.1 service: answers with what it saw, as JSON.
#[derive(Parser)]
struct Args {
    /// Where it listens.
    #[arg(long, default_value = "[::]:80")]
    listen: SocketAddr,
    /// The name it answers with.
    #[arg(long)]
    pod: String,
    /// The revision it answers with.
    #[arg(long, default_value = "main")]
    revision: String,
    /// The service it calls to answer, as http://host[:port].
    #[arg(long)]
    upstream: Option<String>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let listener = TcpListener::bind(args.listen).with_context(|| format!("listening on {}", args.listen))?;
    App { pod: args.pod, revision: args.revision, upstream: args.upstream }.serve(listener)
}
