//! What the filter would do, told beforehand: for `culvert override explain`.

use culvert_xds_client::api::culvert::{
    extensions::filters::http::overrides::v1::{Override as Config, r#override::Edge},
    overrides::v1::{Action, Overrides},
};

use super::{OffloadedTable, names, refusal::Refusal, settings::Settings};
use crate::config::FieldError;

/// What becomes of one override, or of a whole message, at the hops that a filter serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explained {
    /// The cluster of the hop; `None`: the whole message is refused, or nothing is known of the service.
    pub cluster: Option<String>,
    /// The service as the message names it; `None`: the whole message.
    pub service: Option<String>,
    /// What is done, in words.
    pub applied: Vec<String>,
    /// What is refused, with the reason's name.
    pub refused: Vec<(Option<Action>, &'static str)>,
    /// What it depends on that nobody can know beforehand.
    pub depends: Vec<&'static str>,
}

/// What a filter of this configuration does about a message, where discovery has told this.
///
/// `signed`: the message was signed; whether its key is known, only the proxy can say. `now`: in seconds since 1970.
///
/// # Errors
/// The configuration is not one that a filter can have.
pub fn explain(
    config: &Config,
    table: &OffloadedTable,
    message: &Overrides,
    (signed, now): (bool, u64),
) -> Result<Vec<Explained>, FieldError> {
    let settings = Settings::parse(config, "")?;
    let whole = match &settings {
        _ if settings.refuses_all => Some(Refusal::Production),
        _ if settings.edge == Edge::Strip => Some(Refusal::Stripped),
        Settings { signing: Some(signing), .. } if signing.required && !signed => Some(Refusal::NotSigned),
        Settings { signing: Some(signing), .. }
            if signed && message.expires.saturating_sub(now) > signing.max_lifetime =>
        {
            Some(Refusal::LastsTooLong)
        }
        _ if message.is_expired(now) => Some(Refusal::Expired),
        _ if message.overrides.len() > settings.limits.overrides => Some(Refusal::TooMany),
        _ => None,
    };
    let mut depends = Vec::new();
    if settings.edge == Edge::StripExternal {
        depends.push("the request is not from outside");
    }
    if settings.sources.is_some() {
        depends.push("the filter allows the client");
    }
    if signed && settings.signing.is_some() {
        depends.push("the proxy knows the key, and the signature is good");
    }
    if let Some(refusal) = whole {
        let refused = vec![(None, refusal.name())];
        return Ok(vec![Explained { cluster: None, service: None, applied: Vec::new(), refused, depends }]);
    }
    let mut explained = Vec::new();
    for wanted in &message.overrides {
        let mut clusters: Vec<Option<&str>> =
            table.clusters().filter(|cluster| names(&wanted.service, cluster)).map(Some).collect();
        if clusters.is_empty() {
            clusters.push(None);
        }
        for cluster in clusters {
            let mut line = Explained {
                cluster: cluster.map(str::to_owned),
                service: Some(wanted.service.clone()),
                applied: Vec::new(),
                refused: Vec::new(),
                depends: depends.clone(),
            };
            let policy = cluster.and_then(|cluster| table.policy(cluster));
            if policy.as_ref().is_some_and(|policy| policy.sources.is_some()) {
                line.depends.push("the service allows the client");
            }
            if !settings.opts_in(policy.as_deref()) {
                line.refused.push((None, Refusal::NotOptedIn.name()));
                explained.push(line);
                continue;
            }
            for action in wanted.actions() {
                if action == Action::Route && wanted.fault.is_some() && settings.actions.contains(Action::Fault) {
                    continue;
                }
                let found = || cluster.and_then(|cluster| table.find(cluster, wanted));
                match settings.allows(action, wanted, policy.as_deref()) {
                    Err(refusal) => line.refused.push((Some(action), refusal.name())),
                    Ok(()) if action != Action::Route => line.applied.push(wanted.in_words(action)),
                    Ok(()) => match found() {
                        Some(target) => line.applied.push(format!("{} ({})", wanted.in_words(action), target.address)),
                        None => line.refused.push((Some(action), Refusal::Unlisted.name())),
                    },
                }
            }
            explained.push(line);
        }
    }
    Ok(explained)
}

#[cfg(test)]
mod tests {
    use culvert_xds_client::api::culvert::{
        extensions::filters::http::overrides::v1::r#override::Mode,
        overrides::v1::{OffloadedEndpoint, OffloadedService, Override, Policy},
    };

    use super::*;

    fn table(policy: Option<Policy>) -> OffloadedTable {
        let endpoint = OffloadedEndpoint {
            revision: "x".to_owned(),
            address: "10.0.0.9".to_owned(),
            port: 8080,
            pod: String::new(),
            tunnel: false,
        };
        OffloadedTable::from_resources([&OffloadedService {
            cluster_name: "users.default:80".to_owned(),
            service: "users.default".to_owned(),
            endpoints: vec![endpoint],
            policy,
        }])
        .unwrap()
    }

    fn config(change: impl FnOnce(&mut Config)) -> Config {
        let mut config = Config { original_dst_cluster: "odc".to_owned(), ..Config::default() };
        change(&mut config);
        config
    }

    fn asked() -> Overrides {
        let entry = |service: &str, revision: &str, delay_ms| Override {
            service: service.to_owned(),
            revision: revision.to_owned(),
            delay_ms,
            ..Override::default()
        };
        Overrides::of(vec![entry("users", "x", 5), entry("orders", "y", 0)], 100).unwrap()
    }

    #[test]
    fn each_hop_is_told() {
        let explained = explain(&config(|_| {}), &table(None), &asked(), (false, 1)).unwrap();
        assert_eq!(explained.len(), 2);
        assert_eq!(explained[0].cluster.as_deref(), Some("users.default:80"));
        assert_eq!(explained[0].applied, ["revision x (10.0.0.9:8080)"]);
        assert_eq!(explained[0].refused, [(Some(Action::Delay), "action_not_allowed")]);
        assert_eq!((&explained[1].cluster, &*explained[1].refused), (&None, &[(Some(Action::Route), "unlisted")][..]));
    }

    #[test]
    fn policies_and_whole_messages_are_told() {
        let whole =
            |config: Config, now| explain(&config, &table(None), &asked(), (false, now)).unwrap()[0].refused[0].1;
        assert_eq!(whole(config(|it| it.mode = Mode::RefuseAll.into()), 1), "production");
        assert_eq!(whole(config(|it| it.edge = Edge::Strip.into()), 1), "stripped");
        assert_eq!(whole(config(|_| {}), 100), "expired");
        let refuses = Some(Policy::default());
        let explained = explain(&config(|_| {}), &table(refuses), &asked(), (false, 1)).unwrap();
        assert_eq!(explained[0].refused, [(None, "not_opted_in")]);
        let opted = explain(&config(|it| it.require_opt_in = true), &table(None), &asked(), (false, 1)).unwrap();
        assert!(opted.iter().all(|line| line.refused == [(None, "not_opted_in")]));
    }
}
