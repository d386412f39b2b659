//! What an xds matcher finds for a request that shall be let pass or refused.

use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::config::rbac::v3::Action as ProtoAction, google::protobuf::Any, xds::r#type::matcher::v3::Matcher,
};
use prost::Name as _;

use super::{Action, Counters, Engine, Result, action};
use crate::{
    config::{
        FieldError,
        parse::{self, MatchParts, type_name},
    },
    http::match_input::{RequestInput, policy_input},
    stats::Counter,
};

/// `config.rbac.v3.Action`
#[derive(Debug)]
pub(super) struct Found {
    pub(super) name: Box<str>,
    pub(super) action: Action,
    /// With `track_per_rule_stats`.
    pub(super) tracked: Option<(Counter, Counter)>,
}

struct Parts<'a> {
    tracked: Option<&'a Counters<'a>>,
    /// An action is `LOG`.
    logs: bool,
}

pub(super) fn engine(matcher: &Matcher, tracked: Option<&Counters<'_>>, path: &str) -> Result<Engine> {
    let mut parts = Parts { tracked, logs: false };
    let tree = parse::match_tree(matcher, path, &mut parts)?;
    Ok(Engine::Matcher { tree, logs: parts.logs })
}

impl MatchParts for Parts<'_> {
    type Input = RequestInput;
    type Action = Found;

    fn input(&mut self, config: &Any, path: &str) -> Result<Option<RequestInput>> {
        policy_input(config, path)
    }

    fn action(&mut self, config: &Any, path: &str) -> Result<Found> {
        if type_name(config) != ProtoAction::full_name() {
            return Err(parse::unknown_action(config, path));
        }
        let ProtoAction { name, action: kind } = unpack(config, path)?;
        if name.is_empty() {
            return Err(FieldError::new(format!("{path}.name"), "value is required"));
        }
        let action = action(kind);
        self.logs |= action == Action::Log;
        let tracked = self.tracked.map(|counters| counters.of_policy(&name));
        Ok(Found { name: name.into(), action, tracked })
    }
}
