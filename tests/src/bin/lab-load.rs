//! The lab's load generator as a program; see `culvert_tests::load`.

use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use culvert_tests::load::Load;

/// Sends requests and prints what came back as JSON. Everything that is not a 2xx response is a failure.
#[derive(Parser)]
struct Args {
    /// http://host[:port]/path
    url: String,
    /// A header, as `name: value`; may be given more than once.
    #[arg(short = 'H', long = "header", value_parser = parse_header)]
    headers: Vec<(String, String)>,
    /// How many connections send at the same time.
    #[arg(short, long, default_value_t = 8)]
    connections: usize,
    /// Stop after this many requests in all.
    #[arg(short = 'n', long)]
    requests: Option<u64>,
    /// Stop after this many seconds.
    #[arg(short, long)]
    seconds: Option<f64>,
    /// Open a new connection for every request.
    #[arg(long)]
    new_connections: bool,
    /// How many seconds each connect and each response may take.
    #[arg(long, default_value_t = 5.0)]
    timeout: f64,
}

fn parse_header(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once(':').ok_or("expected `name: value`")?;
    Ok((name.trim().to_owned(), value.trim().to_owned()))
}

fn main() -> Result<()> {
    let args = Args::parse();
    let load = Load {
        url: args.url,
        headers: args.headers,
        connections: args.connections,
        requests: args.requests,
        duration: args.seconds.map(Duration::from_secs_f64),
        new_connections: args.new_connections,
        timeout: Duration::from_secs_f64(args.timeout),
    };
    println!("{}", serde_json::to_string(&load.run()?)?);
    Ok(())
}
