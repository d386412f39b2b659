//! Envoy's layered runtime: values that change while the daemon runs, by key, out of layers of which the later win.
//!
//! The layers come from the bootstrap (`static_layer`), from a directory (`disk_layer`), from `/runtime_modify`
//! (`admin_layer`) and from the control plane (`rtds_layer`). Configuration refers to values by [`Key`]s.

mod disk;
mod entry;
mod loader;
mod slots;

pub use disk::DiskLayer;
pub use entry::{Denominator, Entry, Fraction};
pub use loader::{Layer, LayerSource, ModifyError, Runtime, check_values};
pub use slots::{Key, RuntimeFlag, RuntimeFraction, RuntimeInteger, RuntimeNumber};
pub(crate) use slots::{Values, observe, with_values};
