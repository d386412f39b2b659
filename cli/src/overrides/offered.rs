//! Whether somebody offers what a header names: a look at discovery, where its address is known.

use std::path::PathBuf;

use clap::Args;
use culvert_xds_client::overrides::split_service;
use serde_json::Value;

use super::access::Access;
use crate::http;
use crate::status::list;

/// Whom to ask.
#[derive(Debug, Args)]
pub struct Look {
    /// The status address of culvert-discovery (its --http): warns of what nobody offers
    #[arg(long, value_name = "URL", env = "CULVERT_DISCOVERY")]
    discovery: Option<String>,

    /// A file with the developers' token, which discovery may want to tell of a share (its --developer-token-file)
    #[arg(long, value_name = "FILE", env = "CULVERT_DEVELOPER_TOKEN_FILE")]
    token_file: Option<PathBuf>,
}

impl Look {
    /// What is not there at present, or could not be looked up.
    pub fn warnings(&self, set: &[(String, String)], share: Option<&str>) -> Vec<String> {
        let Some(discovery) = &self.discovery else { return Vec::new() };
        let mut warnings = Vec::new();
        if !set.is_empty() {
            let status = http::get(discovery, "/status").and_then(|body| Ok(serde_json::from_slice::<Value>(&body)?));
            match status {
                Ok(status) => {
                    warnings.extend(set.iter().filter_map(|(service, revision)| unoffered(&status, service, revision)))
                }
                Err(error) => warnings.push(format!("whether somebody offers it is not known: {error:#}")),
            }
        }
        if let Some(token) = share {
            let access = Access { discovery: discovery.clone(), token_file: self.token_file.clone() };
            match access.try_ask("GET", &format!("/overrides/shares/{token}"), None) {
                Ok(Ok(share)) if share["expired"] == true => warnings.push("the share has ended".to_owned()),
                Ok(Ok(_)) => {}
                Ok(Err((404, _))) => warnings.push("there is no share with this token".to_owned()),
                Ok(Err((_, said))) => warnings.push(format!("whether there is such a share is not told: {said}")),
                Err(error) => warnings.push(format!("whether there is such a share is not known: {error:#}")),
            }
        }
        warnings
    }
}

/// Why a revision of a service cannot be reached, if discovery knows of none.
fn unoffered(status: &Value, service: &str, revision: &str) -> Option<String> {
    let (name, namespace) = split_service(service);
    let full = format!("{name}.{namespace}");
    let mut ports = list(&status["services"]).iter().filter(|port| port["service"] == *full).peekable();
    if ports.peek().is_none() {
        return Some(format!("there is no service {full}; `culvert services` lists them"));
    }
    let offered = ports.flat_map(|port| list(&port["offloaded"])).any(|endpoint| endpoint["revision"] == revision);
    (!offered).then(|| {
        format!(
            "nobody offers revision {revision} of {full} at present; `culvert override list {full}` shows what there is"
        )
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_nobody_offers_is_named() {
        let status = json!({ "services": [
            { "service": "users.default", "offloaded": [] },
            { "service": "users.default", "offloaded": [{ "revision": "x" }] },
            { "service": "users.shop", "offloaded": [{ "revision": "y" }] },
        ] });
        let warns = |service: &str, revision: &str| unoffered(&status, service, revision).unwrap_or_default();
        assert_eq!((warns("users", "x"), warns("users.shop", "y")), Default::default());
        assert!(warns("users", "y").starts_with("nobody offers revision y of users.default at present; "));
        assert!(warns("front", "x").starts_with("there is no service front.default; "));
    }

    #[test]
    fn without_an_address_nobody_is_asked() {
        let look = Look { discovery: None, token_file: None };
        assert_eq!(look.warnings(&[("users".to_owned(), "x".to_owned())], Some("t")), Vec::<String>::new());
    }
}
