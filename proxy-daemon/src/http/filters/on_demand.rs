//! `envoy.filters.http.on_demand`: pauses a request whose virtual host or cluster is not here until it has been asked for.

use std::{sync::Arc, time::Duration};

use culvert_xds_client::{ads::type_url, json::unpack};
use envoy_types::pb::{
    envoy::extensions::filters::http::on_demand::v3::{OnDemand, OnDemandCds},
    google::protobuf::Any,
};

use super::{FilterCx, Flow, HttpFilter, HttpFilterFactory, PerRoute};
use crate::{
    config::{FieldError, model::ConfigSource, parse},
    http::{
        body::Body,
        stream::{RequestHead, StreamCx},
    },
};

/// How long a cluster is waited for where the configuration does not say.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Where clusters are had on demand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClustersOnDemand {
    /// Where from.
    pub from: ConfigSource,
    /// How long a request waits for one.
    pub timeout: Duration,
}

#[derive(Debug)]
struct OnDemandFactory(Option<Arc<ClustersOnDemand>>);

pub(super) fn parse(typed_config: &Any, cx: &FilterCx<'_>) -> Result<Arc<dyn HttpFilterFactory>, FieldError> {
    let OnDemand { odcds } = unpack(typed_config, cx.path)?;
    let path = format!("{}.odcds", cx.path);
    let clusters = odcds.map(|odcds| clusters_on_demand(&odcds, &path)).transpose()?;
    Ok(Arc::new(OnDemandFactory(clusters.map(Arc::new))))
}

fn clusters_on_demand(config: &OnDemandCds, path: &str) -> Result<ClustersOnDemand, FieldError> {
    let OnDemandCds { source, resources_locator, timeout } = config;
    if !resources_locator.is_empty() {
        return Err(FieldError::unsupported(format!("{path}.resources_locator")));
    }
    let from = parse::config_source(source.as_ref(), &format!("{path}.source"))?;
    let timeout = parse::duration(*timeout, path, "timeout")?.unwrap_or(TIMEOUT);
    Ok(ClustersOnDemand { from, timeout })
}

impl HttpFilterFactory for OnDemandFactory {
    fn request(
        &self,
        _head: &mut RequestHead,
        _body: &mut Body,
        cx: &mut StreamCx,
        _route: PerRoute<'_>,
        _instances: &mut Vec<Box<dyn HttpFilter>>,
    ) -> Flow {
        if cx.route.is_none() {
            return Flow::NeedsRoute;
        }
        match &self.0 {
            Some(clusters) if cx.cluster.is_none() => Flow::NeedsCluster(Arc::clone(clusters)),
            _ => Flow::Continue,
        }
    }

    fn source(&self) -> Option<(&ConfigSource, &'static str)> {
        self.0.as_ref().map(|clusters| (&clusters.from, type_url::CLUSTER))
    }
}
