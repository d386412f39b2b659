//! What was refused last, for `/config_dump` and `culvert xds status`.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use culvert_xds_client::ads::{Resource, Update};

use super::resources;
use crate::config::status::Failure;

/// The resources of one type whose newest version was refused, by name.
#[derive(Default)]
pub(in crate::config) struct Refused(BTreeMap<String, Arc<Failure>>);

impl Refused {
    /// An update is going to be taken: what it does not bring any more, or brings as it is in force, is not refused.
    pub(super) fn begin(&mut self, update: &Update) {
        if update.complete {
            let names: BTreeSet<&str> = update.added.iter().map(|it| it.name.as_str()).collect();
            self.0.retain(|name, _| names.contains(name.as_str()));
        }
        for name in &update.unchanged {
            self.0.remove(&**name);
        }
        for name in &update.removed {
            self.0.remove(name);
        }
    }

    /// A resource is not taken.
    pub(super) fn refuse(&mut self, resource: Resource, details: String) {
        self.insert(resource.name.clone(), resources::failure(resource, details));
    }

    /// The same, where it has been put away already.
    pub(super) fn insert(&mut self, name: String, failure: Arc<Failure>) {
        self.0.insert(name, failure);
    }

    /// A resource is taken.
    pub(super) fn accept(&mut self, name: &str) {
        self.0.remove(name);
    }

    /// All, by name.
    pub(in crate::config) fn by_name(&self) -> &BTreeMap<String, Arc<Failure>> {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resource(name: &str) -> Resource {
        Resource { name: name.to_owned(), ..Default::default() }
    }

    fn refused(names: &[&str]) -> Refused {
        let mut refused = Refused::default();
        names.iter().for_each(|name| refused.refuse(resource(name), "no".to_owned()));
        refused
    }

    fn names(refused: &Refused) -> Vec<&str> {
        refused.by_name().keys().map(String::as_str).collect()
    }

    #[test]
    fn a_complete_update_forgets_what_it_does_not_bring() {
        let mut refused = refused(&["a", "b"]);
        refused.begin(&Update { complete: true, added: vec![resource("b")], ..Default::default() });
        assert_eq!(names(&refused), ["b"]);
    }

    #[test]
    fn any_other_update_forgets_what_it_removes_or_finds_in_force() {
        let mut refused = refused(&["a", "b", "c", "d"]);
        let (unchanged, removed) = (vec!["a".into()], vec!["b".to_owned()]);
        refused.begin(&Update { added: vec![resource("d")], unchanged, removed, ..Default::default() });
        assert_eq!(names(&refused), ["c", "d"]);
        refused.accept("d");
        assert_eq!(names(&refused), ["c"]);
    }
}
