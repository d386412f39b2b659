//! `ExtensionWithMatcher`: another filter, that requests pass by for which a matcher says so.

use std::sync::Arc;

use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::extensions::{
        common::matching::v3::{ExtensionWithMatcher, ExtensionWithMatcherPerRoute},
        filters::common::matcher::action::v3::SkipFilter,
    },
    google::protobuf::Any,
    xds::r#type::matcher::v3::Matcher,
};
use prost::Name as _;

use super::{Factory, FilterCx, Flow, HttpFilter, HttpFilterFactory, PerRoute, PerRouteConfig};
use crate::{
    config::{
        FieldError,
        model::{ConfigSource, MatchTree, OriginalSrc, SecretRef},
        parse::{self, MatchParts, type_name},
    },
    http::{
        body::Body,
        match_input::{RequestInput, Told, any_request_input, request_input},
        stream::{RequestHead, StreamCx},
    },
};

/// What finds requests that pass the filter by.
type Skipped = MatchTree<RequestInput, ()>;

#[derive(Debug)]
struct MatchDelegate {
    /// Where a route says nothing; `None`: all pass the filter by, as in Envoy.
    skipped: Option<Skipped>,
    inner: Factory,
}

impl MatchDelegate {
    fn skipped<'a>(&'a self, route: PerRoute<'a>) -> Option<&'a Skipped> {
        route.most_specific::<Skipped>().or(self.skipped.as_ref())
    }
}

impl HttpFilterFactory for MatchDelegate {
    /// A request that is answered before it comes here was not looked at: the filter has its answer.
    fn stream(&self, route: PerRoute<'_>) -> Option<Box<dyn HttpFilter>> {
        self.skipped(route)?;
        self.inner.stream(route)
    }

    fn request(
        &self,
        head: &mut RequestHead,
        body: &mut Body,
        cx: &mut StreamCx,
        route: PerRoute<'_>,
        instances: &mut Vec<Box<dyn HttpFilter>>,
    ) -> Flow {
        let Some(skipped) = self.skipped(route) else { return Flow::Continue };
        let skips = {
            let metadata = cx.progress.metadata.borrow();
            let told = Told { head, connection: &cx.connection, remote: cx.remote, metadata: metadata.as_deref() };
            skipped.find(&told)
        };
        match skips {
            Some(()) => Flow::Continue,
            None => self.inner.request(head, body, cx, route, instances),
        }
    }

    fn needs_offloaded_services(&self) -> bool {
        self.inner.needs_offloaded_services()
    }

    fn original_src(&self) -> Option<OriginalSrc> {
        self.inner.original_src()
    }

    fn secret(&self) -> Option<&SecretRef> {
        self.inner.secret()
    }

    fn source(&self) -> Option<(&ConfigSource, &'static str)> {
        self.inner.source()
    }
}

pub(super) fn parse(typed_config: &Any, cx: &FilterCx<'_>) -> Result<Arc<dyn HttpFilterFactory>, FieldError> {
    let config: ExtensionWithMatcher = unpack(typed_config, cx.path)?;
    let path = format!("{}.extension_config.typed_config", cx.path);
    let inner = config.extension_config.and_then(|inner| inner.typed_config);
    let inner = inner.ok_or_else(|| FieldError::new(&*path, "value is required"))?;
    let inner = super::parse(&inner, &FilterCx { path: &path, ..*cx })?;
    if inner.is_terminal() {
        return Err(FieldError::new(path, "a terminal filter is not supported by culvert here"));
    }
    let skipped = skipped(config.xds_matcher.as_ref(), cx.path, any_request_input)?;
    Ok(Arc::new(MatchDelegate { skipped, inner }))
}

pub(super) fn parse_per_route(config: &Any, path: &str) -> Result<PerRouteConfig, FieldError> {
    let ExtensionWithMatcherPerRoute { xds_matcher } = unpack(config, path)?;
    // With a query parameter of a route's matcher Envoy finds the action in any case.
    Ok(Arc::new(skipped(xds_matcher.as_ref(), path, request_input)?.unwrap_or_else(MatchTree::empty)))
}

fn skipped(matcher: Option<&Matcher>, path: &str, inputs: Inputs) -> Result<Option<Skipped>, FieldError> {
    let tree = |matcher| parse::match_tree(matcher, &format!("{path}.xds_matcher"), &mut Parts(inputs));
    matcher.map(tree).transpose()
}

type Inputs = fn(&Any, &str) -> Result<Option<RequestInput>, FieldError>;

/// With the inputs that there are.
struct Parts(Inputs);

impl MatchParts for Parts {
    type Input = RequestInput;
    type Action = ();

    fn input(&mut self, config: &Any, path: &str) -> Result<Option<RequestInput>, FieldError> {
        self.0(config, path)
    }

    fn action(&mut self, config: &Any, path: &str) -> Result<(), FieldError> {
        let wanted = type_name(config);
        if wanted != SkipFilter::full_name() {
            let text = format!("an action of type {wanted} is not supported by culvert yet; it has SkipFilter");
            return Err(FieldError::new(path, text));
        }
        let SkipFilter {} = unpack(config, path)?;
        Ok(())
    }
}
