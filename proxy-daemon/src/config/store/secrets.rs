//! What is particular about secrets.

use std::sync::Arc;

use culvert_xds_client::source::Source;

use super::{
    kinds::{Kind, Need},
    state::State,
    watched::{Owner, User},
};
use crate::config::{
    FieldError,
    model::{ClusterConfig, Listener, Secret, SecretName, SecretRef, SecretType},
};

/// What the data plane knows a secret of SDS by.
pub(super) fn name(source: &Source, name: &str) -> SecretName {
    SecretName { source: Some(Arc::new(source.clone())), name: name.into() }
}

impl State {
    /// Refuses a secret that is not what its users want.
    pub(super) fn check_secret(
        &self,
        secret: &Secret,
        (source, name): (&Source, &str),
        users: &[User],
    ) -> Result<(), FieldError> {
        let is = secret.secret_type();
        let needs = users.iter().flat_map(|user| self.needs_of(user));
        let mut wanted = needs.filter(|need| {
            need.kind == Kind::Secrets && *need.wanted.name == *name && *need.wanted.from.source == *source
        });
        match wanted.find_map(|need| need.secret_type.filter(|wanted| *wanted != is)) {
            Some(wanted) => Err(FieldError::new(is.field(), format!("a {} is wanted of this secret", wanted.field()))),
            None => Ok(()),
        }
    }

    fn needs_of(&self, user: &User) -> &[Need] {
        let needs = match &user.owner {
            Owner::Cluster(name) => self.clusters.by_name.get(name).and_then(|entry| entry.needs_of(user.version)),
            Owner::Listener(name) => self.listeners.by_name.get(name).and_then(|entry| entry.needs_of(user.version)),
            Owner::Process => None,
        };
        needs.unwrap_or_default()
    }

    /// Refuses a listener that names a secret of the bootstrap that is not there, or within itself a route to a cluster that
    /// is not there, as Envoy does.
    pub(super) fn check_listener(&self, listener: &Listener) -> Result<(), FieldError> {
        let chains = listener.filter_chains.iter().enumerate();
        let chains = chains.map(|(index, chain)| (format!("filter_chains[{index}]"), chain));
        let default = listener.default_filter_chain.iter().map(|chain| ("default_filter_chain".to_owned(), chain));
        for (path, chain) in chains.chain(default) {
            let secrets = chain.tls.iter().flat_map(|tls| tls.secrets());
            self.check_static(secrets).map_err(|text| FieldError::new(format!("{path}.transport_socket"), text))?;
        }
        let of_filters = listener.connection_managers().flat_map(|manager| manager.secrets());
        self.check_static(of_filters).map_err(|text| FieldError::new("http_filters", text))?;
        for (path, routes) in listener.own_routes() {
            let within = |error: FieldError| FieldError::new(format!("{path}.{}", error.path), error.message);
            self.check_routes(routes, true).map_err(within)?;
        }
        Ok(())
    }

    /// The same for a cluster.
    pub(super) fn check_cluster(&self, cluster: &ClusterConfig) -> Result<(), FieldError> {
        self.check_static(cluster.secrets()).map_err(|text| FieldError::new("transport_socket", text))
    }

    fn check_static<'a>(&self, mut secrets: impl Iterator<Item = (SecretType, &'a SecretRef)>) -> Result<(), String> {
        secrets.try_for_each(|(kind, secret)| match secret {
            SecretRef::Static(name) if !self.static_secrets.contains(&(kind, Arc::clone(name))) => {
                Err(format!("Unknown static secret: {name}"))
            }
            SecretRef::Static(_) | SecretRef::Discovered(_) => Ok(()),
        })
    }
}
