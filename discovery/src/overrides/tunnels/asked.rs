//! What a request for a tunnel asks for: a service's port, and a revision of it.

use http::{HeaderMap, StatusCode};

use super::{Key, MAX_HEADER, PORT, REVISION, SERVICE, SESSION};
use crate::access::Denied;
use crate::kubernetes::ObjectKey;
use crate::mesh::Mesh;

/// What a request says.
pub(super) struct Asked<'a> {
    pub(super) service: &'a str,
    pub(super) revision: &'a str,
    pub(super) session: &'a str,
    /// The port of the client's last tunnel.
    pub(super) port: Option<u16>,
}

pub(super) fn asked(headers: &HeaderMap) -> Result<Asked<'_>, Denied> {
    let get = |name: &str| {
        let value = headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        match value.is_empty() || value.len() > MAX_HEADER {
            true => Err((StatusCode::BAD_REQUEST, format!("the header {name} is missing or too long"))),
            false => Ok(value),
        }
    };
    // Older clients do not say it.
    let port = headers.get(PORT).and_then(|value| value.to_str().ok()?.parse().ok());
    Ok(Asked { service: get(SERVICE)?, revision: get(REVISION)?, session: get(SESSION)?, port })
}

/// The service's port that is meant.
pub(super) fn find(mesh: &Mesh, wanted: &str, revision: &str) -> Result<Key, Denied> {
    let bad = |reason: String| Err((StatusCode::BAD_REQUEST, reason));
    let (name, port) = match wanted.split_once(':') {
        None => (wanted, None),
        Some((name, port)) => match port.parse::<u16>() {
            Ok(port) => (name, Some(port)),
            Err(_) => return bad(format!("`{port}` of `{wanted}` is not a port")),
        },
    };
    // What a header could not say would be of no use.
    if let Err(error) = culvert_xds_client::overrides::Overrides::new([(name, revision)]) {
        return bad(error.to_string());
    }
    let (name, namespace) = culvert_xds_client::overrides::split_service(name);
    let service = ObjectKey::new(namespace, name);
    let Some(known) = mesh.services.get(&service) else {
        let mut names =
            mesh.services.keys().filter(|key| key.name == name).map(|key| format!("{}.{}", key.name, key.namespace));
        let hint = match names.next() {
            Some(other) => format!("; there is {other}"),
            None => "; `culvert services` lists those that there are".to_owned(),
        };
        return Err((StatusCode::NOT_FOUND, format!("there is no service {name}.{namespace}{hint}")));
    };
    let http: Vec<u16> =
        known.ports.iter().filter(|(_, port)| port.protocol.is_http()).map(|(port, _)| *port).collect();
    match (port, http.as_slice()) {
        (Some(port), _) if http.contains(&port) => Ok(Key { service, port, revision: revision.to_owned() }),
        (Some(port), _) => {
            bad(format!("{name}.{namespace} has no port {port} that speaks HTTP: overrides are for HTTP"))
        }
        (None, [port]) => Ok(Key { service, port: *port, revision: revision.to_owned() }),
        (None, []) => bad(format!("{name}.{namespace} has no port that speaks HTTP: overrides are for HTTP")),
        (None, several) => {
            let several: Vec<_> = several.iter().map(|port| format!("{wanted}:{port}")).collect();
            bad(format!("{name}.{namespace} has several ports; say {}", several.join(" or ")))
        }
    }
}
