//! The filter's configuration, checked.

use std::{net::IpAddr, sync::Arc};

use culvert_xds_client::{
    api::culvert::{
        extensions::filters::http::overrides::v1::{
            Override as Config,
            r#override::{Edge, Limits as ProtoLimits, Mode, Signing as ProtoSigning},
        },
        overrides::v1::{Action, Sources as ProtoSources},
    },
    overrides::{MAX_HEADER_BYTES, MAX_OVERRIDES},
};

use crate::{
    config::{
        FieldError,
        model::{Cidr, ConfigSource, ResourceRef, SecretName, SecretRef},
    },
    http::stream::StreamCx,
    tls::TlsInfo,
};

/// The most milliseconds that a limit of delays may be.
const MOST_DELAY: u32 = 300_000;
const MOST_TIMEOUT: u32 = 3_600_000;
const MOST_CONFIG: u32 = 16_384;
const MOST_DEBUG: u32 = 1000;
const DEFAULT_LIFETIME: u32 = 86_400;

/// What is configured.
#[derive(Debug)]
pub(super) struct Settings {
    pub(super) original_dst_cluster: Box<str>,
    pub(super) refuses_all: bool,
    pub(super) edge: Edge,
    pub(super) actions: Actions,
    pub(super) require_opt_in: bool,
    pub(super) sources: Option<Sources>,
    pub(super) signing: Option<Signing>,
    pub(super) limits: Limits,
    pub(super) debug_response: bool,
    pub(super) watch_context: bool,
}

/// What must be true of signatures.
#[derive(Debug)]
pub(super) struct Signing {
    pub(super) secret: SecretRef,
    /// The same, by which it is found.
    pub(super) name: SecretName,
    pub(super) required: bool,
    /// In seconds.
    pub(super) max_lifetime: u64,
}

/// What may not be more.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Limits {
    pub(super) header_bytes: usize,
    pub(super) overrides: usize,
    pub(super) delay_ms: u32,
    pub(super) timeout_ms: u32,
    pub(super) config_bytes: usize,
    pub(super) debug_per_second: u32,
}

/// A set of actions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Actions(u32);

impl Actions {
    /// Those of a message.
    pub(super) fn parse(actions: &[i32], path: &str) -> Result<Actions, FieldError> {
        let mut all = Actions::default();
        for (index, number) in actions.iter().enumerate() {
            match Action::try_from(*number) {
                Ok(Action::Unspecified) | Err(_) => {
                    return Err(FieldError::new(format!("{path}[{index}]"), format!("{number} is no action")));
                }
                Ok(action) => all = all.with(action),
            }
        }
        Ok(all)
    }

    pub(super) fn with(self, action: Action) -> Actions {
        Actions(self.0 | 1 << action as u32)
    }

    pub(super) fn contains(self, action: Action) -> bool {
        self.0 & 1 << action as u32 != 0
    }
}

/// Who may ask.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Sources {
    pods: Vec<Pattern>,
    principals: Vec<Pattern>,
    ranges: Vec<Cidr>,
}

/// A text, or how it begins.
#[derive(Debug, PartialEq, Eq)]
enum Pattern {
    Exact(Box<str>),
    Prefix(Box<str>),
}

impl Pattern {
    fn matches(&self, text: &str) -> bool {
        match self {
            Pattern::Exact(exact) => **exact == *text,
            Pattern::Prefix(prefix) => text.starts_with(&**prefix),
        }
    }
}

impl Sources {
    pub(super) fn parse(sources: &ProtoSources, path: &str) -> Result<Sources, FieldError> {
        let patterns = |texts: &[String], field: &str| {
            let pattern = |(index, text): (usize, &String)| match text.strip_suffix('*') {
                Some("") => Ok(Pattern::Prefix("".into())),
                Some(prefix) if !prefix.contains('*') => Ok(Pattern::Prefix(prefix.into())),
                None if !text.is_empty() && !text.contains('*') => Ok(Pattern::Exact(text.as_str().into())),
                _ => {
                    let text = "a name is needed, which may have one `*`, at its end";
                    Err(FieldError::new(format!("{path}.{field}[{index}]"), text))
                }
            };
            texts.iter().enumerate().map(pattern).collect::<Result<Vec<_>, _>>()
        };
        let range = |(index, text): (usize, &String)| {
            text.parse().map_err(|error: String| FieldError::new(format!("{path}.ranges[{index}]"), error))
        };
        Ok(Sources {
            pods: patterns(&sources.pods, "pods")?,
            principals: patterns(&sources.principals, "principals")?,
            ranges: sources.ranges.iter().enumerate().map(range).collect::<Result<_, _>>()?,
        })
    }

    /// Whether the client is one of them. What it says of itself does not count: neither `x-forwarded-for`, nor a certificate that
    /// nobody has validated.
    pub(super) fn include(&self, cx: &StreamCx) -> bool {
        let address = cx.connection.remote.ip().to_canonical();
        let names = || cx.connection.tls().filter(|tls| tls.is_validated()).and_then(TlsInfo::peer);
        self.include_address(address)
            || (!self.pods.is_empty()
                && cx.worker.with_pod_name(address, |pod| self.pods.iter().any(|known| known.matches(pod))))
            || (!self.principals.is_empty()
                && names().is_some_and(|peer| {
                    peer.uri_and_dns_names().any(|name| self.principals.iter().any(|known| known.matches(name)))
                }))
    }

    fn include_address(&self, address: IpAddr) -> bool {
        self.ranges.iter().any(|range| range.contains(address))
    }
}

impl Settings {
    pub(super) fn parse(config: &Config, path: &str) -> Result<Settings, FieldError> {
        let field = |name: &str| format!("{path}.{name}");
        if config.original_dst_cluster.is_empty() {
            return Err(FieldError::new(field("original_dst_cluster"), "must name an ORIGINAL_DST cluster"));
        }
        let unknown = |name: &str, number: i32| FieldError::new(field(name), format!("{number} is none of its values"));
        let mode = Mode::try_from(config.mode).map_err(|_| unknown("mode", config.mode))?;
        let edge = Edge::try_from(config.edge).map_err(|_| unknown("edge", config.edge))?;
        let sources = config.sources.as_ref().map(|sources| Sources::parse(sources, &field("sources")));
        let signing = config.signing.as_ref().map(|signing| Signing::parse(signing, &field("signing")));
        Ok(Settings {
            original_dst_cluster: config.original_dst_cluster.as_str().into(),
            refuses_all: mode == Mode::RefuseAll,
            edge,
            actions: Actions::parse(&config.actions, &field("actions"))?.with(Action::Route),
            require_opt_in: config.require_opt_in,
            sources: sources.transpose()?,
            signing: signing.transpose()?,
            limits: Limits::parse(config.limits.as_ref().unwrap_or(&ProtoLimits::default()), &field("limits"))?,
            debug_response: config.debug_response,
            watch_context: config.watch_context,
        })
    }
}

impl Signing {
    fn parse(signing: &ProtoSigning, path: &str) -> Result<Signing, FieldError> {
        if signing.secret.is_empty() {
            return Err(FieldError::new(format!("{path}.secret"), "value is required"));
        }
        let secret = if signing.ads {
            SecretRef::Discovered(ResourceRef::new(&signing.secret, ConfigSource::default()))
        } else {
            SecretRef::Static(Arc::from(&*signing.secret))
        };
        let max_lifetime = signing.max_lifetime_s.unwrap_or(DEFAULT_LIFETIME).into();
        Ok(Signing { name: secret.name(), secret, required: signing.required, max_lifetime })
    }
}

impl Limits {
    fn parse(limits: &ProtoLimits, path: &str) -> Result<Limits, FieldError> {
        let limit = |name: &str, stated: Option<u32>, default: u32, most: u32| match stated.unwrap_or(default) {
            number if number <= most => Ok(number),
            number => Err(FieldError::new(format!("{path}.{name}"), format!("{number} is more than {most}"))),
        };
        let bytes = |name: &str, stated, default: usize, most: usize| {
            // Both are small.
            let of = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
            limit(name, stated, of(default), of(most)).map(|number| number as usize)
        };
        Ok(Limits {
            header_bytes: bytes("header_bytes", limits.header_bytes, MAX_HEADER_BYTES, MAX_HEADER_BYTES)?,
            overrides: bytes("overrides", limits.overrides, MAX_OVERRIDES, MAX_OVERRIDES)?,
            delay_ms: limit("delay_ms", limits.delay_ms, 10_000, MOST_DELAY)?,
            timeout_ms: limit("timeout_ms", limits.timeout_ms, 60_000, MOST_TIMEOUT)?,
            config_bytes: limit("config_bytes", limits.config_bytes, 4096, MOST_CONFIG)? as usize,
            debug_per_second: limit("debug_per_second", limits.debug_per_second, 10, MOST_DEBUG)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources(pods: &[&str], ranges: &[&str]) -> Result<Sources, String> {
        let owned = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
        let sources = ProtoSources { pods: owned(pods), principals: Vec::new(), ranges: owned(ranges) };
        Sources::parse(&sources, "sources").map_err(|error| error.to_string())
    }

    #[test]
    fn patterns_have_one_star_at_their_end() {
        let pods = sources(&["shop/front-*", "shop/users"], &[]).unwrap().pods;
        let matches = |name| pods.iter().any(|pattern| pattern.matches(name));
        assert!(matches("shop/front-1") && matches("shop/users"));
        assert!(!matches("shop/users-1") && !matches("other/front-1") && !matches(""));
        for wrong in ["", "a*b", "**"] {
            assert!(sources(&[wrong], &[]).unwrap_err().starts_with("sources.pods[0]: a name is needed"), "{wrong}");
        }
    }

    #[test]
    fn ranges_hold_mapped_addresses_too() {
        let ranges = sources(&[], &["10.0.0.0/8"]).unwrap();
        let includes = |address: &str| ranges.include_address(address.parse::<IpAddr>().unwrap().to_canonical());
        assert!(includes("10.1.2.3") && includes("::ffff:10.1.2.3") && !includes("11.0.0.1"));
        assert!(!sources(&[], &[]).unwrap().include_address("10.0.0.1".parse().unwrap()), "nobody is nobody");
    }

    #[test]
    fn limits_have_defaults_and_bounds() {
        let limits = Limits::parse(&ProtoLimits::default(), "limits").unwrap();
        let expected = Limits {
            header_bytes: 65_536,
            overrides: 64,
            delay_ms: 10_000,
            timeout_ms: 60_000,
            config_bytes: 4096,
            debug_per_second: 10,
        };
        assert_eq!(limits, expected);
        let most = ProtoLimits { delay_ms: Some(MOST_DELAY + 1), ..ProtoLimits::default() };
        assert_eq!(
            Limits::parse(&most, "limits").unwrap_err().to_string(),
            "limits.delay_ms: 300001 is more than 300000"
        );
        let most = ProtoLimits { header_bytes: Some(65_537), ..ProtoLimits::default() };
        assert!(Limits::parse(&most, "limits").unwrap_err().to_string().starts_with("limits.header_bytes"));
    }

    #[test]
    fn settings_name_what_is_wrong() {
        let good = Config { original_dst_cluster: "odc".to_owned(), ..Config::default() };
        let settings = Settings::parse(&good, "p").unwrap();
        assert!(settings.actions.contains(Action::Route) && !settings.actions.contains(Action::Fault));
        let error = |config: Config| Settings::parse(&config, "p").unwrap_err().to_string();
        assert_eq!(error(Config::default()), "p.original_dst_cluster: must name an ORIGINAL_DST cluster");
        assert_eq!(error(Config { mode: 9, ..good.clone() }), "p.mode: 9 is none of its values");
        assert_eq!(error(Config { edge: 9, ..good.clone() }), "p.edge: 9 is none of its values");
        assert_eq!(error(Config { actions: vec![0], ..good.clone() }), "p.actions[0]: 0 is no action");
        let signing = Some(ProtoSigning::default());
        assert_eq!(error(Config { signing, ..good }), "p.signing.secret: value is required");
    }
}
