//! What was refused last, for `/config_dump` and `culvert xds status`.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use culvert_xds_client::{
    ads::{Resource, Update},
    source::Source,
};

use super::resources;
use crate::config::status::Failure;

/// The resources of one type whose newest version was refused, by where they come from and their names.
#[derive(Default)]
pub(in crate::config) struct Refused(BTreeMap<Arc<Source>, BTreeMap<String, Arc<Failure>>>);

impl Refused {
    /// An update is going to be taken: what it does not bring any more, or brings as it is in force, is not refused.
    pub(super) fn begin(&mut self, source: &Source, update: &Update) {
        let Some(names) = self.0.get_mut(source) else { return };
        if update.complete {
            let brought: BTreeSet<&str> = update.added.iter().map(|it| it.name.as_str()).collect();
            names.retain(|name, _| brought.contains(name.as_str()));
        }
        for name in &update.unchanged {
            names.remove(&**name);
        }
        for name in &update.removed {
            names.remove(name);
        }
        self.tidy(source);
    }

    /// A resource is not taken.
    pub(super) fn refuse(&mut self, source: &Source, resource: Resource, details: String) {
        self.insert(source, resource.name.clone(), resources::failure(resource, details));
    }

    /// The same, where it has been put away already.
    pub(super) fn insert(&mut self, source: &Source, name: String, failure: Arc<Failure>) {
        let names = match self.0.get_mut(source) {
            Some(names) => names,
            None => self.0.entry(Arc::new(source.clone())).or_default(),
        };
        names.insert(name, failure);
    }

    /// A resource is taken.
    pub(super) fn accept(&mut self, source: &Source, name: &str) {
        if let Some(names) = self.0.get_mut(source) {
            names.remove(name);
            self.tidy(source);
        }
    }

    /// Forgets what `gone` says of a source.
    pub(super) fn forget(&mut self, source: &Source, gone: impl Fn(&str) -> bool) {
        if let Some(names) = self.0.get_mut(source) {
            names.retain(|name, _| !gone(name));
            self.tidy(source);
        }
    }

    /// Whether what the source sent last by this name was refused.
    pub(super) fn contains(&self, source: &Source, name: &str) -> bool {
        self.0.get(source).is_some_and(|names| names.contains_key(name))
    }

    /// All, by source and name.
    pub(in crate::config) fn entries(&self) -> impl Iterator<Item = (&Arc<Source>, &String, &Arc<Failure>)> {
        let all = self.0.iter();
        all.flat_map(|(source, names)| names.iter().map(move |(name, failure)| (source, name, failure)))
    }

    fn tidy(&mut self, source: &Source) {
        if self.0.get(source).is_some_and(BTreeMap::is_empty) {
            self.0.remove(source);
        }
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
        names.iter().for_each(|name| refused.refuse(&Source::Ads, resource(name), "no".to_owned()));
        refused
    }

    fn names(refused: &Refused) -> Vec<&str> {
        refused.entries().map(|(_, name, _)| name.as_str()).collect()
    }

    #[test]
    fn a_complete_update_forgets_what_it_does_not_bring() {
        let mut refused = refused(&["a", "b"]);
        refused.begin(&Source::Ads, &Update { complete: true, added: vec![resource("b")], ..Default::default() });
        assert_eq!(names(&refused), ["b"]);
    }

    #[test]
    fn any_other_update_forgets_what_it_removes_or_finds_in_force() {
        let mut refused = refused(&["a", "b", "c", "d"]);
        let (unchanged, removed) = (vec!["a".into()], vec!["b".to_owned()]);
        refused.begin(&Source::Ads, &Update { added: vec![resource("d")], unchanged, removed, ..Default::default() });
        assert_eq!(names(&refused), ["c", "d"]);
        refused.accept(&Source::Ads, "d");
        assert_eq!(names(&refused), ["c"]);
    }
}
