//! What a daemon takes over of an earlier one's pinned maps, so that neither an upgrade nor a crash loses what people read
//! and what programs see: counters, pods' accounts, and what is kept of sockets that were led elsewhere.
//!
//! A map of the same layout and shape is used as it is, by both daemons while both run. Of another layout only the
//! counters are carried on, whose numbers are stable. All else begins anew.

use std::path::{Path, PathBuf};

use aya::Ebpf;
use aya::maps::{Map, MapData, MapError, MapInfo, PerCpuArray, PerCpuValues};
use culvert_proxy_ebpf::{LAYOUT, Reason};

use super::error::chain;
use super::kernel;
use super::state::map_directories;

/// What the programs counted.
pub(super) const COUNTERS: &str = "COUNTERS";
/// UDP sockets that the kernel has connected to backends.
pub(super) const CONNECTED: &str = "CONNECTED";

/// The maps that are taken over. All others a daemon fills by what it is told, or they belong to its own sockets.
const INHERITED: [&str; 6] = [COUNTERS, "POD_COUNTERS", "DETOURS", "CHOICES", "REPLIES", CONNECTED];

/// Where maps of this layout are pinned.
pub(super) fn maps_directory(pin_path: &Path) -> PathBuf {
    pin_path.join(format!("maps-{LAYOUT}"))
}

/// The pinned maps that may take the place of those of the same names that were just made.
pub(super) fn usable(fresh: &Ebpf, pin_path: &Path) -> Vec<(&'static str, PathBuf)> {
    let directory = maps_directory(pin_path);
    let mut usable = Vec::new();
    for name in INHERITED {
        let path = directory.join(name);
        // Fails where nothing is pinned.
        let Ok(pinned) = MapInfo::from_pin(&path) else { continue };
        if info(fresh, name).is_some_and(|own| shape(&own) == shape(&pinned)) {
            usable.push((name, path));
        } else {
            tracing::warn!(map = name, "an earlier daemon's map has another shape: what it held begins anew");
        }
    }
    usable
}

/// Has the counters go on where those of a daemon with maps of another layout are now. To be called before any program is
/// attached.
pub(super) fn carry_counters_on(ebpf: &mut Ebpf, pin_path: &Path) {
    let number = |path: &Path| path.file_name()?.to_str()?.strip_prefix("maps-")?.parse::<u32>().ok();
    // The first layout had no number.
    let newest = map_directories(pin_path).into_iter().max_by_key(|path| number(path));
    let Some(from) = newest.filter(|path| *path != maps_directory(pin_path)) else { return };
    match copy_counters(ebpf, &from) {
        Ok(()) => tracing::info!(
            from = %from.display(),
            to = LAYOUT,
            "maps of another layout: the kernel's counters go on, those of pods begin anew"
        ),
        Err(reason) => {
            tracing::warn!(from = %from.display(), to = LAYOUT, reason, "maps of another layout: all counters begin anew");
        }
    }
}

fn copy_counters(ebpf: &mut Ebpf, from: &Path) -> Result<(), String> {
    let error = |error: MapError| chain(&error);
    let earlier = MapData::from_pin(from.join(COUNTERS)).and_then(Map::from_map_data).map_err(error)?;
    let earlier = PerCpuArray::<_, u64>::try_from(earlier).map_err(error)?;
    let mut counters: PerCpuArray<_, u64> = kernel::map(ebpf, COUNTERS).map_err(|error| error.to_string())?;
    for number in 0..earlier.len().min(Reason::SLOTS as u32) {
        // All of it goes to one CPU's slot: only sums are shown.
        let mut values: Vec<u64> = earlier.get(&number, 0).map_err(error)?.to_vec();
        let sum = values.iter().sum();
        values.fill(0);
        values.iter_mut().take(1).for_each(|first| *first = sum);
        let values = PerCpuValues::try_from(values).map_err(|error| error.to_string())?;
        counters.set(number, values, 0).map_err(error)?;
    }
    Ok(())
}

/// What the kernel says of a map of ours.
pub(super) fn info(ebpf: &Ebpf, name: &str) -> Option<MapInfo> {
    let data = match ebpf.map(name)? {
        Map::Array(data)
        | Map::HashMap(data)
        | Map::LruHashMap(data)
        | Map::PerCpuArray(data)
        | Map::PerCpuHashMap(data)
        | Map::SkStorage(data) => data,
        _ => return None,
    };
    data.info().ok()
}

/// What two maps have to have in common to be used by the same programs.
fn shape(info: &MapInfo) -> (Option<u32>, [u32; 4]) {
    let sizes = [info.key_size(), info.value_size(), info.max_entries(), info.map_flags()];
    (info.map_type().ok().map(|kind| kind as u32), sizes)
}
