//! The token buckets of `envoy.filters.http.local_ratelimit`.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use crate::http::{
    descriptors::{Descriptor, Entries},
    filters::{
        recent::Recent,
        shared::{Kept, Shared},
    },
    token_bucket::TokenBucket,
};

/// What is configured of them.
#[derive(Debug, Default)]
pub(super) struct Limits {
    pub(super) of_all: Option<Limit>,
    /// By the descriptors that requests have.
    pub(super) of_descriptors: HashMap<Entries, Rule>,
    /// For those that have none there.
    pub(super) of_wildcards: Vec<(Box<[Wanted]>, Rule)>,
    /// The bucket of all requests counts also those that have one of their own.
    pub(super) always_default: bool,
    /// How many buckets each wildcard has.
    pub(super) most: usize,
}

/// A descriptor's limit.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rule {
    pub(super) limit: Limit,
    /// `shadow_mode`: whoever is over it is counted, and let through.
    pub(super) shadow: bool,
}

/// The buckets: of all workers, or of one connection.
#[derive(Debug)]
pub(super) struct Limiter {
    of_all: Option<Held>,
    of_descriptors: HashMap<Entries, (Held, bool)>,
    of_wildcards: Box<[Wildcard]>,
    always_default: bool,
}

/// A bucket, and whom it is of.
#[derive(Debug)]
enum Held {
    /// All workers.
    Shared(Shared<TokenBucket>),
    /// One connection.
    Own(Arc<TokenBucket>),
}

impl Held {
    fn bucket(&self) -> Bucket<'_> {
        match self {
            Held::Shared(bucket) => Bucket::Known(bucket),
            Held::Own(bucket) => Bucket::Own(Arc::clone(bucket)),
        }
    }
}

/// The bucket that responses show.
#[derive(Debug)]
pub(super) enum Shown {
    Known(Kept<TokenBucket>),
    Own(Arc<TokenBucket>),
}

impl Shown {
    pub(super) fn get(&self) -> &TokenBucket {
        match self {
            Shown::Known(bucket) => bucket,
            Shown::Own(bucket) => bucket,
        }
    }
}

/// What became of a request.
pub(super) struct Taken<'a> {
    pub(super) allowed: bool,
    /// A limit that is only a shadow was exceeded.
    pub(super) shadowed: bool,
    /// The bucket that decided.
    pub(super) bucket: Option<Bucket<'a>>,
    /// Whether responses tell of that bucket, where a descriptor says so.
    pub(super) is_told: Option<bool>,
}

impl Limiter {
    /// `of_all_workers`: whether all workers share it.
    pub(super) fn new(limits: &Limits, of_all_workers: bool) -> Limiter {
        let held = |limit: Limit| match of_all_workers {
            true => Held::Shared(Shared::new(limit.bucket())),
            false => Held::Own(Arc::new(limit.bucket())),
        };
        let of_descriptors = limits.of_descriptors.iter();
        let of_wildcards = limits.of_wildcards.iter().map(|(entries, rule)| Wildcard {
            entries: entries.clone(),
            rule: *rule,
            buckets: Mutex::new(Recent::new(limits.most)),
        });
        Limiter {
            of_all: limits.of_all.map(held),
            of_descriptors: of_descriptors
                .map(|(entries, rule)| (entries.clone(), (held(rule.limit), rule.shadow)))
                .collect(),
            of_wildcards: of_wildcards.collect(),
            always_default: limits.always_default,
        }
    }

    /// Whether requests are counted by their descriptors.
    pub(super) fn has_descriptors(&self) -> bool {
        !self.of_descriptors.is_empty() || !self.of_wildcards.is_empty()
    }

    /// Takes the tokens of a request, of all buckets that count it.
    pub(super) fn take(&self, descriptors: &[Descriptor], now: Instant) -> Taken<'_> {
        let default = self.of_all.as_ref().map(Held::bucket);
        let counted = |it: &Descriptor| {
            let (bucket, shadow) = self.of_descriptor(&it.entries)?;
            Some((bucket, (shadow, it.is_told), it.hits.map_or(1, |(hits, _)| hits)))
        };
        let mut buckets: Vec<_> = descriptors.iter().filter_map(counted).collect();
        // The slowest first, as in Envoy.
        buckets.sort_by_key(|(bucket, ..)| std::cmp::Reverse(bucket.get().per_token()));
        let counts_all = buckets.is_empty() || self.always_default;
        let mut shadowed = None;
        for (bucket, (shadow, is_told), hits) in &buckets {
            if !bucket.get().take_all(*hits, now) {
                if !shadow {
                    let bucket = Some(bucket.clone());
                    return Taken { allowed: false, shadowed: false, bucket, is_told: *is_told };
                }
                shadowed = Some((bucket.clone(), *is_told));
            }
        }
        if let Some(default) = default.as_ref().filter(|_| counts_all)
            && !default.get().take(now)
        {
            return Taken { allowed: false, shadowed: false, bucket: Some(default.clone()), is_told: None };
        }
        let first = buckets.into_iter().next().map(|(bucket, (_, is_told), _)| (bucket, is_told));
        let is_shadow = shadowed.is_some();
        let (bucket, is_told) = shadowed.or(first).or(default.map(|bucket| (bucket, None))).unzip();
        Taken { allowed: true, shadowed: is_shadow, bucket, is_told: is_told.flatten() }
    }

    fn of_descriptor(&self, descriptor: &Entries) -> Option<(Bucket<'_>, bool)> {
        let known = self.of_descriptors.get(descriptor).map(|(held, shadow)| (held.bucket(), *shadow));
        known.or_else(|| {
            let mut found = self.of_wildcards.iter();
            found.find_map(|wildcard| Some((Bucket::Own(wildcard.bucket(descriptor)?), wildcard.rule.shadow)))
        })
    }
}

/// A key, and its value; `None`: any.
pub(super) type Wanted = (Box<str>, Option<Box<str>>);

/// A descriptor with entries that have any value: each of those that requests have gets a bucket of its own.
#[derive(Debug)]
struct Wildcard {
    entries: Box<[Wanted]>,
    rule: Rule,
    /// Those that were used last.
    buckets: Mutex<Recent<Entries, Arc<TokenBucket>>>,
}

/// `TokenBucket`
#[derive(Debug, Clone, Copy)]
pub(super) struct Limit {
    pub(super) max_tokens: u64,
    pub(super) tokens_per_fill: u64,
    pub(super) interval: Duration,
}

impl Limit {
    fn bucket(self) -> TokenBucket {
        TokenBucket::new(self.max_tokens, self.tokens_per_fill, self.interval)
    }
}

impl Wildcard {
    /// The bucket of a descriptor; `None`: it is another one.
    fn bucket(&self, descriptor: &Entries) -> Option<Arc<TokenBucket>> {
        let mut pairs = descriptor.iter().zip(&self.entries);
        let all = descriptor.len() == self.entries.len()
            && pairs.all(|((key, value), (own, wanted))| key == own && wanted.as_ref().is_none_or(|it| it == value));
        all.then(|| {
            // What is kept there is whole at any time.
            let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(bucket) = buckets.get(descriptor) {
                return Arc::clone(bucket);
            }
            let bucket = Arc::new(self.rule.limit.bucket());
            buckets.insert(Arc::new(descriptor.clone()), Arc::clone(&bucket));
            bucket
        })
    }
}

/// A bucket that counts a request.
#[derive(Clone)]
pub(super) enum Bucket<'a> {
    Known(&'a Shared<TokenBucket>),
    Own(Arc<TokenBucket>),
}

impl Bucket<'_> {
    pub(super) fn get(&self) -> &TokenBucket {
        match self {
            Bucket::Known(bucket) => bucket,
            Bucket::Own(bucket) => bucket,
        }
    }

    pub(super) fn keep(&self) -> Shown {
        match self {
            Bucket::Known(bucket) => Shown::Known(bucket.keep()),
            Bucket::Own(bucket) => Shown::Own(Arc::clone(bucket)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOURLY: Limit = Limit { max_tokens: 1, tokens_per_fill: 1, interval: Duration::from_secs(3600) };

    fn entries(pairs: &[(&str, &str)]) -> Entries {
        pairs.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect()
    }

    #[test]
    fn wildcards_have_a_bucket_for_each_value() {
        let wildcard = Wildcard {
            entries: [("user".into(), None), ("plan".into(), Some("free".into()))].into(),
            rule: Rule { limit: HOURLY, shadow: false },
            buckets: Mutex::new(Recent::new(20)),
        };
        let bucket = |pairs: &[(&str, &str)]| wildcard.bucket(&entries(pairs));
        let (one, other) = ([("user", "1"), ("plan", "free")], [("user", "2"), ("plan", "free")]);
        assert!(bucket(&one).unwrap().take(Instant::now()));
        assert!(!bucket(&one).unwrap().take(Instant::now()), "it is the same bucket");
        assert!(bucket(&other).unwrap().take(Instant::now()), "it is another one");
        assert!(bucket(&[("user", "1"), ("plan", "paid")]).is_none());
        assert!(bucket(&[("plan", "free"), ("user", "1")]).is_none());
        assert!(bucket(&[("user", "1")]).is_none());
    }

    #[test]
    fn what_was_not_used_for_long_is_forgotten() {
        let wildcard = Wildcard {
            entries: [("user".into(), None)].into(),
            rule: Rule { limit: HOURLY, shadow: false },
            buckets: Mutex::new(Recent::new(2)),
        };
        let is_new = |value: &str| wildcard.bucket(&entries(&[("user", value)])).unwrap().take(Instant::now());
        assert!(is_new("1") && is_new("2"));
        assert!(!is_new("1"));
        assert!(is_new("3"), "in the place of 2");
        assert!(!is_new("1"));
        assert!(is_new("2"), "in the place of 3");
        assert!(!is_new("1") && !is_new("2"));
        assert_eq!(wildcard.buckets.lock().unwrap().lengths(), (2, 2));
    }
}
