//! `jwt_cache_config`: tokens whose signatures were found good, so that they need not be verified again.

use std::cell::RefCell;

use envoy_types::pb::envoy::extensions::filters::http::jwt_authn::v3::JwtCacheConfig;
use thread_local::ThreadLocal;

use crate::http::filters::recent::Recent;

/// How many tokens are kept where nothing else is said.
const DEFAULT_MOST: usize = 100;
/// The longest token that is kept where nothing else is said, in bytes.
const DEFAULT_LONGEST: usize = 4096;

/// A provider's tokens, for each thread, each with the number of the set of keys that has verified it. Only signatures are kept in mind: what
/// else a token has to be is looked at with each request.
#[derive(Debug)]
pub(super) struct Cache {
    most: usize,
    longest: usize,
    // It is large.
    of_threads: Box<ThreadLocal<RefCell<Recent<str, u64>>>>,
}

impl Cache {
    pub(super) fn new(config: &JwtCacheConfig) -> Cache {
        let or = |value: u32, default| if value == 0 { default } else { value as usize };
        Cache {
            most: or(config.jwt_cache_size, DEFAULT_MOST),
            longest: or(config.jwt_max_token_size, DEFAULT_LONGEST),
            of_threads: Box::default(),
        }
    }

    /// The set of keys by which the token's signature was found good.
    pub(super) fn get(&self, token: &str) -> Option<u64> {
        self.own().borrow_mut().get(token).copied()
    }

    /// The token's signature is good by this set of keys.
    pub(super) fn keep(&self, token: &str, keys: u64) {
        let mut kept = self.own().borrow_mut();
        if token.len() <= self.longest {
            kept.forget(token);
            kept.insert(token.into(), keys);
        }
    }

    /// The token is of no use any more.
    pub(super) fn forget(&self, token: &str) {
        self.own().borrow_mut().forget(token);
    }

    /// Those of this thread that were used last.
    fn own(&self) -> &RefCell<Recent<str, u64>> {
        self.of_threads.get_or(|| RefCell::new(Recent::new(self.most)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_that_were_used_last_are_kept() {
        let cache = Cache::new(&JwtCacheConfig { jwt_cache_size: 2, jwt_max_token_size: 5 });
        for token in ["one", "two", "three"] {
            assert_eq!(cache.get(token), None);
            cache.keep(token, 1);
            cache.keep("one", 1);
        }
        assert_eq!(["one", "two", "three"].map(|token| cache.get(token)), [Some(1), None, Some(1)]);
        cache.keep("longer", 1);
        assert_eq!(cache.get("longer"), None);
        cache.keep("three", 2);
        assert_eq!(cache.get("three"), Some(2));
        cache.forget("one");
        cache.forget("none");
        assert_eq!((cache.get("one"), cache.get("three")), (None, Some(2)));
        std::thread::scope(|scope| {
            scope.spawn(|| assert_eq!(cache.get("three"), None, "each thread has its own"));
        });
    }
}
