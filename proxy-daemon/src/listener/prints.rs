use std::{
    collections::HashSet,
    hash::{DefaultHasher, Hash, Hasher},
};

use prost::encoding::{self, DecodeContext, WireType};

/// Field numbers of `Listener`.
const FILTER_CHAINS: u32 = 3;
const DEFAULT_FILTER_CHAIN: u32 = 25;

/// What a listener is made of, as hashes of its encoded message: two versions with the same hashes are the same. Encodings
/// may differ without need; then a chain that stays is taken for a new one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prints {
    /// Everything but the filter chains.
    pub rest: u64,
    chains: Vec<u64>,
    default: Option<u64>,
}

impl Prints {
    /// The hashes of an encoded `envoy.config.listener.v3.Listener`; `None` where it cannot be decoded.
    pub fn of(mut message: &[u8]) -> Option<Prints> {
        let (mut rest, mut chains, mut default) = (DefaultHasher::new(), Vec::new(), None);
        while !message.is_empty() {
            let start = message;
            let (tag, wire_type) = encoding::decode_key(&mut message).ok()?;
            encoding::skip_field(wire_type, tag, &mut message, DecodeContext::default()).ok()?;
            let field = &start[..start.len() - message.len()];
            match tag {
                FILTER_CHAINS if wire_type == WireType::LengthDelimited => chains.push(hash(field)),
                DEFAULT_FILTER_CHAIN if wire_type == WireType::LengthDelimited && default.is_none() => {
                    default = Some(hash(field));
                }
                _ => field.hash(&mut rest),
            }
        }
        Some(Prints { rest: rest.finish(), chains, default })
    }

    /// How many of the chains are not among those of `next`.
    pub fn gone_in(&self, next: &Prints) -> usize {
        let kept: HashSet<u64> = next.chains.iter().chain(&next.default).copied().collect();
        self.chains.iter().chain(&self.default).filter(|chain| !kept.contains(chain)).count()
    }

    /// The hash of the chain at `index` of `chains` chains; after them comes the default one.
    pub(super) fn chain(&self, index: usize, chains: usize) -> Option<u64> {
        if index == chains { self.default } else { self.chains.get(index).copied() }
    }
}

fn hash(field: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    field.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::config::listener::v3::{FilterChain, Listener};
    use prost::Message;

    use super::*;

    fn prints(edit: impl FnOnce(&mut Listener)) -> Prints {
        let chain = |name: &str| FilterChain { name: name.to_owned(), ..FilterChain::default() };
        let mut listener = Listener {
            name: "l".to_owned(),
            filter_chains: vec![chain("a"), chain("b")],
            default_filter_chain: Some(chain("d")),
            ..Listener::default()
        };
        edit(&mut listener);
        Prints::of(&listener.encode_to_vec()).unwrap()
    }

    #[test]
    fn each_change_shows_where_it_is() {
        let base = prints(|_| {});
        assert_eq!(base, prints(|_| {}));
        let chain = prints(|listener| listener.filter_chains[1].name = "c".to_owned());
        assert_eq!((chain.rest, chain.chains[0], chain.default), (base.rest, base.chains[0], base.default));
        assert_ne!(chain.chains[1], base.chains[1]);
        let default = prints(|listener| listener.default_filter_chain = None);
        assert_eq!((default.rest, &default.chains), (base.rest, &base.chains));
        assert_ne!(default.default, base.default);
        let rest = prints(|listener| listener.stat_prefix = "x".to_owned());
        assert_ne!(rest.rest, base.rest);
        assert_eq!(rest.chains, base.chains);
        assert_eq!(Prints::of(b"\xff"), None);
    }
}
