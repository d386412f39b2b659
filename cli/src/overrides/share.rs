//! `culvert override share`: sets of overrides that discovery keeps, each with a token that stands for it.

use clap::{Args, Subcommand, ValueEnum};
use culvert_discovery::overrides::SHARES;
use serde_json::{Value, json};

use super::access::Access;
use super::header::parse_set;
use super::message;
use super::terminal::time;
use crate::status::{cell, list};
use crate::table;

/// Shown after the help.
pub const HELP: &str = "\
Examples:
  culvert override share create checkout --set users=feature-x --set orders=r2 --expires 8h
  curl $(culvert override header --share TOKEN --output curl) http://front/
  culvert override share list
  culvert override share delete checkout

A share is a set of overrides under a name and a short token: everybody who sends the token's header takes part, and the set
can be as large as 64 services without the header growing. A token of a share that has ended, or never was, is refused and
counted (refused.share_expired, refused.share_unknown): the request goes where it would have gone without it.";

/// The subcommands of `culvert override share`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Keep a set of overrides; prints its token
    Create(CreateFlags),
    /// Show all shares
    List(ListFlags),
    /// Show one share
    Show(NameFlags),
    /// End a share at once
    Delete(NameFlags),
}

/// Flags of `culvert override share create`.
#[derive(Debug, Args)]
pub struct CreateFlags {
    /// Its name: 1 to 63 of A-Za-z0-9-_.
    #[arg(value_name = "NAME")]
    name: String,

    /// A service (name, or name.namespace) and the revision it is to be. May be repeated.
    #[arg(long = "set", value_name = "SERVICE=REVISION", required = true, value_parser = parse_set)]
    set: Vec<(String, String)>,

    /// How long it lasts: 1m to 30d
    #[arg(long, value_name = "TIME", default_value = "8h", value_parser = parse_time)]
    expires: i64,

    #[command(flatten)]
    access: Access,

    /// How to print it
    #[arg(long, short, default_value = "text")]
    output: Output,
}

/// Flags of `culvert override share list`.
#[derive(Debug, Args)]
pub struct ListFlags {
    #[command(flatten)]
    access: Access,

    /// How to print it
    #[arg(long, short, default_value = "text")]
    output: Output,
}

/// Flags of the commands on one share.
#[derive(Debug, Args)]
pub struct NameFlags {
    /// The share's name or token
    #[arg(value_name = "NAME")]
    name: String,

    #[command(flatten)]
    access: Access,

    /// How to print it
    #[arg(long, short, default_value = "text")]
    output: Output,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people
    #[value(alias = "plain")]
    Text,
    /// For programs
    Json,
}

/// Runs a subcommand; gives what is to be printed.
///
/// # Errors
/// With what is wrong with the flags, or what discovery says.
pub fn run(command: Command) -> anyhow::Result<String> {
    let (answer, output, text): (Value, Output, fn(&Value) -> String) = match &command {
        Command::Create(flags) => {
            let item = message(&flags.set, None)?.to_baggage_item();
            let body = json!({ "name": flags.name, "item": item, "expires_in": flags.expires });
            (flags.access.ask("POST", SHARES, Some(&body))?, flags.output, created)
        }
        Command::List(flags) => (flags.access.ask("GET", SHARES, None)?, flags.output, listed),
        Command::Show(flags) => (flags.ask("GET")?, flags.output, shown),
        Command::Delete(flags) => (flags.ask("DELETE")?, flags.output, deleted),
    };
    Ok(match output {
        Output::Json => format!("{answer:#}\n"),
        Output::Text => text(&answer),
    })
}

impl NameFlags {
    fn ask(&self, method: &str) -> anyhow::Result<Value> {
        let known = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        anyhow::ensure!(
            !self.name.is_empty() && self.name.bytes().all(known),
            "`{}` is no name of a share; `culvert override share list` shows them",
            self.name
        );
        self.access.ask(method, &format!("{SHARES}/{}", self.name), None)
    }
}

fn created(share: &Value) -> String {
    let mut text = shown(share);
    let token = cell(&share["token"]);
    text.push_str(&format!("\nUse it:\n  curl $(culvert override header --share {token} --output curl) http://...\n"));
    for missing in list(&share["unlisted"]) {
        text.push_str(&format!(
            "note: {} is not offered by anybody at present; `culvert override list` shows what is\n",
            cell(missing)
        ));
    }
    text
}

fn shown(share: &Value) -> String {
    let until = if share["expired"] == true { "ended" } else { "until" };
    let expires = time(share["expires"].as_i64().unwrap_or_default());
    let mut text = format!("{}: token {}, {until} {expires}\n", cell(&share["name"]), cell(&share["token"]));
    for entry in list(&share["overrides"]) {
        text.push_str(&format!("  {} -> revision {}\n", cell(&entry["service"]), cell(&entry["revision"])));
    }
    text
}

fn deleted(share: &Value) -> String {
    format!("{} has ended; its token {} is refused from now on\n", cell(&share["name"]), cell(&share["token"]))
}

fn listed(shares: &Value) -> String {
    if list(shares).is_empty() {
        return "no shares; `culvert override share create NAME --set SERVICE=REVISION` makes one\n".to_owned();
    }
    let row = |share: &Value| {
        let entries = list(&share["overrides"]).iter();
        let entries: Vec<_> =
            entries.map(|entry| format!("{}={}", cell(&entry["service"]), cell(&entry["revision"]))).collect();
        let expires = time(share["expires"].as_i64().unwrap_or_default());
        let until = if share["expired"] == true { format!("ended {expires}") } else { expires };
        vec![cell(&share["name"]), cell(&share["token"]), until, entries.join(",")]
    };
    let rows: Vec<Vec<String>> = list(shares).iter().map(row).collect();
    table::lines(&["NAME", "TOKEN", "UNTIL", "OVERRIDES"], &rows, "", table::terminal_width())
}

/// `90s`, `30m`, `8h` or `2d`, in seconds.
fn parse_time(text: &str) -> Result<i64, String> {
    let (number, unit) = text.split_at(text.len() - text.chars().next_back().map_or(0, char::len_utf8));
    let unit = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => 0,
    };
    let seconds = number.parse::<i64>().ok().and_then(|number| number.checked_mul(unit)).filter(|_| unit > 0);
    let range = culvert_discovery::overrides::shares::SECONDS;
    match seconds {
        Some(seconds) if range.contains(&seconds) => Ok(seconds),
        Some(_) => Err("1m to 30d are possible".to_owned()),
        None => Err("expected a number and s, m, h or d, for example 8h".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_a_unit() {
        assert_eq!(["90s", "30m", "8h", "30d"].map(parse_time), [90, 1800, 28_800, 2_592_000].map(Ok));
        for text in ["", "8", "h", "8 h", "8w", "-8h", "1é", "31d", "59s", "99999999999999999d"] {
            assert!(parse_time(text).is_err(), "{text}");
        }
    }

    #[test]
    fn answers_are_for_people() {
        let share = json!({
            "name": "checkout", "token": "abcd2345efgh", "expires": 1_700_000_000, "expired": false,
            "overrides": [{ "service": "users", "revision": "x" }], "unlisted": ["users=x"],
        });
        let text = created(&share);
        assert!(
            text.starts_with("checkout: token abcd2345efgh, until 2023-11-14T22:13:20Z\n  users -> revision x\n"),
            "{text}"
        );
        assert!(
            text.contains("header --share abcd2345efgh --output curl") && text.contains("note: users=x is not"),
            "{text}"
        );
        let text = listed(&json!([share]));
        assert_eq!(
            text.lines().nth(1).unwrap().split_whitespace().collect::<Vec<_>>(),
            ["checkout", "abcd2345efgh", "2023-11-14T22:13:20Z", "users=x"]
        );
        assert!(listed(&json!([])).starts_with("no shares; `culvert override share create"));
    }
}
