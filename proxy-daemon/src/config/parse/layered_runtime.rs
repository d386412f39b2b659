use std::{
    collections::{HashMap, HashSet},
    path::Path,
};

use culvert_xds_client::{ads::type_url, sources::Config as Sources};
use envoy_types::pb::{
    envoy::{
        config::bootstrap::v3::{
            Bootstrap,
            runtime_layer::{DiskLayer as ProtoDisk, LayerSpecifier},
        },
        service::runtime::v3::Runtime,
    },
    google::protobuf::Struct,
};

use super::{
    common::{Result, required},
    config_source::config_source,
    support::{self, join},
};
use crate::{
    config::{FieldError, model::ResourceRef},
    layered_runtime::{DiskLayer, Entry, Layer, LayerSource, check_values},
};

/// The layers of a bootstrap. The texts of errors are Envoy's.
pub(super) fn layered_runtime(bootstrap: &Bootstrap, sources: &Sources) -> Result<Vec<Layer>> {
    let cluster = bootstrap.node.as_ref().map(|node| node.cluster.as_str()).unwrap_or_default();
    let layers = bootstrap.layered_runtime.as_ref().map(|runtime| runtime.layers.as_slice()).unwrap_or_default();
    let (mut names, mut admin) = (HashSet::new(), false);
    let mut parsed = Vec::with_capacity(layers.len());
    for (index, layer) in layers.iter().enumerate() {
        let path = format!("layered_runtime.layers[{index}]");
        if !names.insert(layer.name.as_str()) {
            return Err(FieldError::new(join(&path, "name"), format!("Duplicate layer name: {}", layer.name)));
        }
        let source = match &layer.layer_specifier {
            Some(LayerSpecifier::StaticLayer(layer)) => {
                LayerSource::Static(values(layer, &join(&path, "static_layer"))?)
            }
            Some(LayerSpecifier::DiskLayer(layer)) => {
                LayerSource::Disk(disk(layer, cluster, &join(&path, "disk_layer"))?)
            }
            Some(LayerSpecifier::AdminLayer(_)) => {
                if std::mem::replace(&mut admin, true) {
                    let text = "Too many admin layers specified in LayeredRuntime, at most one may be specified";
                    return Err(FieldError::new(join(&path, "admin_layer"), text));
                }
                LayerSource::Admin
            }
            Some(LayerSpecifier::RtdsLayer(layer)) => {
                let path = join(&path, "rtds_layer");
                if layer.name.is_empty() {
                    return Err(required(&path, "name"));
                }
                let from = config_source(layer.rtds_config.as_ref(), &join(&path, "rtds_config"))?;
                let checked = sources.check_static(&from.source, type_url::RUNTIME);
                checked.map_err(|text| FieldError::new(join(&path, "rtds_config"), text))?;
                LayerSource::Rtds(ResourceRef::new(&layer.name, from))
            }
            None => return Err(required(&path, "layer_specifier")),
        };
        parsed.push(Layer { name: layer.name.clone(), source });
    }
    Ok(parsed)
}

/// The values of an RTDS resource.
///
/// # Errors
/// The key of a value that is none.
pub fn runtime_values(resource: &Runtime, path: &str) -> Result<HashMap<String, Entry>> {
    support::check(resource, path)?;
    resource.layer.as_ref().map_or_else(|| Ok(HashMap::new()), |layer| values(layer, &join(path, "layer")))
}

fn values(layer: &Struct, path: &str) -> Result<HashMap<String, Entry>> {
    check_values(layer)
        .map_err(|key| FieldError::new(join(path, &key), format!("Invalid runtime entry value for {key}")))
}

fn disk(layer: &ProtoDisk, cluster: &str, path: &str) -> Result<DiskLayer> {
    let root = Path::new(&layer.symlink_root);
    // The directory that it is in is watched.
    if !root.is_absolute() || root.file_name().is_none() {
        let text = format!("invalid file path {}", layer.symlink_root);
        return Err(FieldError::new(join(path, "symlink_root"), text));
    }
    // An absolute path would replace what it is joined to.
    let mut subdirectory = Path::new(layer.subdirectory.trim_start_matches('/')).to_path_buf();
    if layer.append_service_cluster {
        subdirectory.push(cluster.trim_start_matches('/'));
    }
    Ok(DiskLayer { symlink_root: root.to_path_buf(), subdirectory })
}
