//! HTTP filters whose configuration ECDS delivers.

use std::{fmt::Debug, sync::Arc};

use arc_swap::ArcSwapOption;
use envoy_types::pb::google::protobuf::Any;

use super::{FilterCx, HttpFilterFactory, Registered, r#override, registry::find};
use crate::config::{
    FieldError,
    model::{OriginalSrc, ResourceRef, SecretRef},
    parse::type_name,
};

/// A filter that is configured.
pub type Factory = Arc<dyn HttpFilterFactory>;

/// A place in a filter chain that ECDS fills: with what was delivered, else with the default, else with nothing.
///
/// Each connection manager has places of its own, because filters count under its name. Streams look at a place once, at
/// their start, and keep what they found there.
#[derive(Debug)]
pub struct DiscoveredFilter {
    /// What fills it.
    pub wanted: ResourceRef,
    /// `apply_default_config_without_warming`: the listener does not wait for what is delivered.
    pub without_warming: bool,
    type_names: Box<[String]>,
    is_last: bool,
    stat_prefix: Box<str>,
    default: Option<Factory>,
    // An `Arc` of a trait object is two words, which cannot be swapped at once.
    current: ArcSwapOption<Factory>,
}

impl DiscoveredFilter {
    /// A place that has no default yet. `type_names`: the messages that its configuration may be; `is_last`: it is the
    /// last of its chain; `stat_prefix`: the connection manager's.
    pub fn new(
        wanted: ResourceRef,
        without_warming: bool,
        type_names: Box<[String]>,
        is_last: bool,
        stat_prefix: &str,
    ) -> DiscoveredFilter {
        let (default, current) = (None, ArcSwapOption::empty());
        DiscoveredFilter {
            wanted,
            without_warming,
            type_names,
            is_last,
            stat_prefix: stat_prefix.into(),
            default,
            current,
        }
    }

    /// With a configuration that serves whenever none has been delivered.
    pub fn with_default(mut self, default: Factory) -> DiscoveredFilter {
        self.default = Some(default);
        self.set(None);
        self
    }

    /// Reads a configuration for this place; it is not put there yet.
    ///
    /// # Errors
    /// Why it cannot be here, with Envoy's texts: not one of the types that are allowed, terminal and not last, or the
    /// other way about; or the field that is wrong or not honoured, below `path`.
    pub fn parse(&self, config: &Any, path: &str) -> Result<Factory, FieldError> {
        let name = type_name(config);
        if !self.type_names.iter().any(|allowed| allowed == name) {
            let allowed = self.type_names.join(", ");
            let text = format!("Error: filter config has type URL {name} but expect {allowed}.");
            return Err(FieldError::new(path, text));
        }
        let Registered { name: kind, parse, .. } = find(config, path)?;
        let factory = parse(config, &FilterCx { path, stat_prefix: &self.stat_prefix })?;
        // Whoever waits for secrets looks at the listener, which does not know what is delivered.
        if let Some(SecretRef::Discovered(_)) = factory.secret() {
            let text = "secrets of ADS are not supported by culvert yet in filters that ECDS configures";
            return Err(FieldError::new(path, text));
        }
        let own_name = &self.wanted.name;
        match (factory.is_terminal(), self.is_last) {
            (true, false) => Err(FieldError::new(
                path,
                format!(
                    "Error: terminal filter named {own_name} of type {kind} must be the last filter in a http filter \
                     chain."
                ),
            )),
            (false, true) => Err(FieldError::new(
                path,
                format!(
                    "Error: non-terminal filter named {own_name} of type {kind} is the last filter in a http filter \
                     chain."
                ),
            )),
            _ => Ok(factory),
        }
    }

    /// Fills the place; `None`: with the default.
    pub fn set(&self, delivered: Option<Factory>) {
        self.current.store(delivered.or_else(|| self.default.clone()).map(Arc::new));
    }

    /// Whether there is something in the place.
    pub fn is_filled(&self) -> bool {
        self.current.load().is_some()
    }
}

/// Where a filter's configuration comes from.
#[derive(Debug, Clone)]
pub enum FilterSource {
    /// Written into the connection manager.
    Fixed(Factory),
    /// ECDS.
    Discovered(Arc<DiscoveredFilter>),
}

impl FilterSource {
    /// Looks at the filter that is configured now, where one is.
    pub fn with<R>(&self, look: impl FnOnce(&dyn HttpFilterFactory) -> R) -> Option<R> {
        match self {
            FilterSource::Fixed(factory) => Some(look(&**factory)),
            FilterSource::Discovered(place) => place.current.load().as_deref().map(|factory| look(&**factory)),
        }
    }

    /// The place that ECDS fills, if it does.
    pub fn discovered(&self) -> Option<&Arc<DiscoveredFilter>> {
        match self {
            FilterSource::Discovered(place) => Some(place),
            FilterSource::Fixed(_) => None,
        }
    }

    /// From where the filter has connections to hosts come, as far as that is known.
    pub fn original_src(&self) -> Option<OriginalSrc> {
        match self {
            FilterSource::Fixed(factory) => factory.original_src(),
            FilterSource::Discovered(place) => place.default.as_ref()?.original_src(),
        }
    }

    /// The secret that the filter needs.
    pub fn secret(&self) -> Option<&SecretRef> {
        match self {
            FilterSource::Fixed(factory) => factory.secret(),
            FilterSource::Discovered(place) => place.default.as_ref()?.secret(),
        }
    }

    /// Whether the filter looks at the offloaded services, or may come to.
    pub fn needs_offloaded_services(&self) -> bool {
        match self {
            FilterSource::Fixed(factory) => factory.needs_offloaded_services(),
            FilterSource::Discovered(place) => place.type_names.iter().any(|name| name == r#override::TYPE_NAME),
        }
    }
}
