//! What a service has to say about overrides of its requests: docs/overrides.md.

use std::collections::BTreeSet;
use std::net::IpAddr;

use culvert_xds_client::api::culvert::overrides::v1::{Action, Policy, Sources};
use serde::Deserialize;

/// What holds for overrides of one service.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct OverridePolicy {
    /// Whether its requests may be overridden.
    pub allowed: bool,
    /// What they may ask for, of what the mesh allows. All of that if it is not stated.
    pub actions: Option<BTreeSet<OverrideAction>>,
    /// Who may ask. All if it is not stated.
    pub sources: Option<OverrideSources>,
}

/// What an override may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "the proto has them: culvert.overrides.v1.Action")]
pub enum OverrideAction {
    Route,
    Fault,
    Delay,
    Timeout,
    Debug,
    Sample,
    Config,
}

/// Who may ask: whoever fits one of these.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct OverrideSources {
    /// Pods, as `namespace/name`; a `*` at the end stands for any rest.
    pub pods: Vec<Pattern>,
    /// URI or DNS names of clients' certificates; a `*` at the end stands for any rest.
    pub principals: Vec<Pattern>,
    /// Clients' addresses.
    pub ranges: Vec<AddressRange>,
}

/// A name, or how names begin.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Pattern(String);

/// An address range.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct AddressRange(String);

impl AddressRange {
    /// An address and how many of its bits count.
    #[must_use]
    pub fn parts(&self) -> (IpAddr, u8) {
        // It was looked at when it was read.
        let parts =
            self.0.split_once('/').and_then(|(address, bits)| Some((address.parse().ok()?, bits.parse().ok()?)));
        parts.unwrap_or((std::net::Ipv4Addr::BROADCAST.into(), 32))
    }
}

impl TryFrom<String> for Pattern {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let name = text.strip_suffix('*').unwrap_or(&text);
        if text.is_empty() || name.contains('*') {
            return Err(format!("`{text}` is not a name, which may have one `*`, at its end"));
        }
        Ok(Self(text))
    }
}

impl TryFrom<String> for AddressRange {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not an address range such as 10.0.0.0/8 or fd00::/8");
        let (address, bits) = text.split_once('/').ok_or_else(wrong)?;
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let bits: u8 = bits.parse().map_err(|_| wrong())?;
        let most = if address.to_canonical().is_ipv4() { 32 } else { 128 };
        if bits > most { Err(wrong()) } else { Ok(Self(text)) }
    }
}

impl OverridePolicy {
    /// The same as proxies are told.
    #[must_use]
    pub fn message(&self) -> Policy {
        let action = |action: &OverrideAction| match action {
            OverrideAction::Route => Action::Route,
            OverrideAction::Fault => Action::Fault,
            OverrideAction::Delay => Action::Delay,
            OverrideAction::Timeout => Action::Timeout,
            OverrideAction::Debug => Action::Debug,
            OverrideAction::Sample => Action::Sample,
            OverrideAction::Config => Action::Config,
        };
        let texts = |patterns: &[Pattern]| patterns.iter().map(|pattern| pattern.0.clone()).collect();
        Policy {
            // An empty list would be all of them.
            allowed: self.allowed && self.actions.as_ref().is_none_or(|actions| !actions.is_empty()),
            actions: self.actions.iter().flatten().map(|it| action(it).into()).collect(),
            sources: self.sources.as_ref().map(|OverrideSources { pods, principals, ranges }| Sources {
                pods: texts(pods),
                principals: texts(principals),
                ranges: ranges.iter().map(|range| range.0.clone()).collect(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(yaml: &str) -> Result<Policy, String> {
        let policy: Result<OverridePolicy, _> = serde_saphyr::from_str(yaml);
        policy.map(|policy| policy.message()).map_err(|error| error.to_string())
    }

    #[test]
    fn policies_are_told_to_proxies() {
        let policy =
            read("{allowed: true, actions: [delay, route], sources: {pods: [shop/front-*], ranges: [10.0.0.0/8]}}");
        let sources =
            Sources { pods: vec!["shop/front-*".into()], principals: vec![], ranges: vec!["10.0.0.0/8".into()] };
        let actions = vec![Action::Route.into(), Action::Delay.into()];
        assert_eq!(policy, Ok(Policy { allowed: true, actions, sources: Some(sources) }));
        assert_eq!(read("{allowed: false}"), Ok(Policy::default()));
        assert_eq!(read("{allowed: true, actions: []}"), Ok(Policy::default()), "nothing is not everything");
    }

    #[test]
    fn mistakes_are_named() {
        for (yaml, expected) in [
            ("{actions: [route]}", "allowed"),
            ("{allowed: true, actions: [everything]}", "everything"),
            ("{allowed: true, sources: {pods: ['a*b']}}", "one `*`"),
            ("{allowed: true, sources: {ranges: [10.0.0.0/33]}}", "not an address range"),
            ("{allowed: true, services: []}", "services"),
        ] {
            let error = read(yaml).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
