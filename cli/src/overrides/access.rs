//! Discovery's API for shares and tunnels: where it is, and who asks.

use std::path::PathBuf;

use anyhow::{Context, anyhow, ensure};
use clap::Args;
use serde_json::Value;

use crate::http;

/// Flags of all commands that ask discovery for shares or tunnels.
#[derive(Debug, Args)]
pub struct Access {
    /// The status address of culvert-discovery (its --http)
    #[arg(long, value_name = "URL", env = "CULVERT_DISCOVERY", default_value = "http://127.0.0.1:18001")]
    pub discovery: String,

    /// A file with the developers' token, which discovery may want (its --developer-token-file)
    #[arg(long, value_name = "FILE", env = "CULVERT_DEVELOPER_TOKEN_FILE")]
    pub token_file: Option<PathBuf>,
}

impl Access {
    /// The developers' token, if there is one.
    ///
    /// # Errors
    /// When its file cannot be read or has none.
    pub fn token(&self) -> anyhow::Result<Option<String>> {
        let Some(path) = &self.token_file else { return Ok(None) };
        let token = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let token = token.trim();
        let known = |byte: u8| byte.is_ascii_graphic();
        ensure!(!token.is_empty() && token.bytes().all(known), "{} has no token", path.display());
        Ok(Some(token.to_owned()))
    }

    /// Asks discovery; gives what it answers.
    ///
    /// # Errors
    /// When it cannot be reached, or refuses.
    pub fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> anyhow::Result<Value> {
        self.try_ask(method, path, body)?.map_err(|(_, said)| anyhow!(said))
    }

    /// Asks discovery; gives what it answers, or the status of a refusal and what it says.
    ///
    /// # Errors
    /// When it cannot be reached.
    pub fn try_ask(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> anyhow::Result<Result<Value, (u16, String)>> {
        let mut headers = String::new();
        if let Some(token) = self.token()? {
            headers.push_str(&format!("Authorization: Bearer {token}\r\n"));
        }
        let body = body.map(Value::to_string).unwrap_or_default();
        if !body.is_empty() {
            headers.push_str("Content-Type: application/json\r\n");
        }
        let (status, answer) = http::send(&self.discovery, method, path, &headers, &body).with_context(|| {
            format!("no answer from {}; is culvert-discovery running with --http at that address?", self.discovery)
        })?;
        if (200..300).contains(&status) {
            return http::json(&answer).map(Ok).map_err(|found| {
                anyhow!("{} is not culvert-discovery, or an older one: it answered with {found}", self.discovery)
            });
        }
        Ok(Err((status, refusal(status, &answer))))
    }
}

/// What a refusal of discovery means, and what to do.
pub fn refusal(status: u16, answer: &[u8]) -> String {
    let said = serde_json::from_slice::<Value>(answer).ok();
    let said = said.as_ref().and_then(|said| said["error"].as_str().map(str::to_owned));
    let said = said.unwrap_or_else(|| String::from_utf8_lossy(&answer[..answer.len().min(200)]).trim().to_owned());
    match status {
        401 if said.ends_with("is needed") => format!("{said}; give the file that it is in with --token-file"),
        405 => format!("discovery is an older one without shares and tunnels ({status}: {said})"),
        _ => said,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_say_what_to_do() {
        let answer = br#"{"error": "the developers' token is needed"}"#;
        assert_eq!(
            refusal(401, answer),
            "the developers' token is needed; give the file that it is in with --token-file"
        );
        let answer = br#"{"error": "the token that was sent is not the developers' token"}"#;
        assert_eq!(refusal(401, answer), "the token that was sent is not the developers' token");
        assert_eq!(refusal(409, br#"{"error": "taken"}"#), "taken");
        assert!(refusal(405, b"only GET is answered here\n").contains("older one"));
    }
}
