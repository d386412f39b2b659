use std::{collections::HashSet, path::Path};

use envoy_types::pb::envoy::config::bootstrap::v3::{
    Bootstrap,
    runtime_layer::{DiskLayer as ProtoDisk, LayerSpecifier},
};

use super::{
    common::{Result, required},
    support::join,
};
use crate::{
    config::FieldError,
    layered_runtime::{DiskLayer, Layer, LayerSource, check_values},
};

/// The layers of a bootstrap. The texts of errors are Envoy's.
pub(super) fn layered_runtime(bootstrap: &Bootstrap) -> Result<Vec<Layer>> {
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
            Some(LayerSpecifier::StaticLayer(values)) => LayerSource::Static(check_values(values).map_err(|key| {
                let text = format!("Invalid runtime entry value for {key}");
                FieldError::new(format!("{path}.static_layer.{key}"), text)
            })?),
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
            Some(LayerSpecifier::RtdsLayer(_)) => return Err(FieldError::unsupported(join(&path, "rtds_layer"))),
            None => return Err(required(&path, "layer_specifier")),
        };
        parsed.push(Layer { name: layer.name.clone(), source });
    }
    Ok(parsed)
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
