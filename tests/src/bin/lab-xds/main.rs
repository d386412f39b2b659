//! Measures how a proxy takes xDS updates, culvertd and Envoy in turn on the same pushes; see docs/performance.md.
//! `cargo xtask bench xds` builds and runs this.

mod measure;
mod proxy;
mod report;
mod world;

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::Parser;

use measure::{Sizes, measure};
use proxy::{Contender, Programs};

/// Pushes clusters to culvertd and Envoy in turn, and prints what it cost them.
#[derive(Parser)]
struct Args {
    /// The culvertd to measure.
    #[arg(long)]
    culvertd: PathBuf,
    /// The Envoy to measure.
    #[arg(long)]
    envoy: PathBuf,
    /// Where files go.
    #[arg(long)]
    dir: PathBuf,
    /// Numbers of clusters, each with 10 endpoints.
    #[arg(long, value_delimiter = ',', default_value = "5000,10000")]
    clusters: Vec<usize>,
    /// How many changes of one endpoint follow the push.
    #[arg(long, default_value_t = 300)]
    changes: usize,
    /// How many rounds; each runs both proxies with both variants of the protocol and each number of clusters.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Only culvertd.
    #[arg(long)]
    only_culvertd: bool,
    /// Print all samples as JSON.
    #[arg(long)]
    json: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    std::fs::create_dir_all(&args.dir).with_context(|| format!("creating {}", args.dir.display()))?;
    let programs = Programs { culvertd: args.culvertd, envoy: args.envoy, dir: args.dir };
    let contenders: &[Contender] =
        if args.only_culvertd { &[Contender::Culvert] } else { &[Contender::Culvert, Contender::Envoy] };
    let mut samples = Vec::new();
    for round in 1..=args.rounds {
        for &clusters in &args.clusters {
            for delta in [false, true] {
                for &proxy in contenders {
                    let variant = if delta { "delta" } else { "SotW" };
                    eprintln!("round {round} of {}: {clusters} clusters, {variant}: {} ...", args.rounds, proxy.name());
                    let sizes = Sizes { clusters, changes: args.changes };
                    let sample = measure(proxy, &programs, sizes, delta)
                        .with_context(|| format!("{} with {clusters} clusters, {variant}", proxy.name()))?;
                    samples.push(sample);
                }
            }
        }
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report::json(&samples))?);
    } else {
        print!("{}", report::table(&samples));
    }
    Ok(())
}
