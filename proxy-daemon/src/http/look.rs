//! Headers, found by looking at each of the few that there are.
//!
//! A message has five or ten headers, and is asked thirty times for one that mostly is not there. To compare its names costs less than
//! to work out the hash of a long name, in which each byte waits for the one before. A message of many headers is left to its map.

use http::{HeaderMap, HeaderName, HeaderValue, header::GetAll};

/// Up to so many are few.
const FEW: usize = 16;

/// What a map of headers has, as by its methods of the same meaning.
pub(crate) trait Look {
    /// `contains_key`
    fn has(&self, name: &HeaderName) -> bool;
    /// `get`
    fn first(&self, name: &HeaderName) -> Option<&HeaderValue>;
    /// `get_all`; `None` where there is none.
    fn every(&self, name: &HeaderName) -> Option<GetAll<'_, HeaderValue>>;
    /// Whether it has several values of one name.
    fn repeats(&self, name: &HeaderName) -> bool;
    /// `remove`
    fn take(&mut self, name: &HeaderName) -> Option<HeaderValue>;
}

impl Look for HeaderMap {
    #[inline]
    fn has(&self, name: &HeaderName) -> bool {
        if self.keys_len() <= FEW { self.keys().any(|known| known == name) } else { self.contains_key(name) }
    }

    #[inline]
    fn first(&self, name: &HeaderName) -> Option<&HeaderValue> {
        if self.len() > FEW {
            return self.get(name);
        }
        self.iter().find(|(known, _)| *known == name).map(|(_, value)| value)
    }

    #[inline]
    fn every(&self, name: &HeaderName) -> Option<GetAll<'_, HeaderValue>> {
        self.has(name).then(|| self.get_all(name))
    }

    #[inline]
    fn repeats(&self, name: &HeaderName) -> bool {
        self.len() != self.keys_len() && self.get_all(name).iter().nth(1).is_some()
    }

    #[inline]
    fn take(&mut self, name: &HeaderName) -> Option<HeaderValue> {
        if self.has(name) { self.remove(name) } else { None }
    }
}

#[cfg(test)]
mod tests {
    use http::header::{ACCEPT, HOST};

    use super::*;

    #[test]
    fn it_finds_what_the_map_finds() {
        let own = HeaderName::from_static("x-own");
        for others in [0, 3, FEW, 3 * FEW] {
            let mut headers = HeaderMap::new();
            headers.append(&own, HeaderValue::from_static("1"));
            for number in 0..others {
                headers.append(format!("x-{number}").parse::<HeaderName>().unwrap(), number.into());
            }
            headers.append(&own, HeaderValue::from_static("2"));
            headers.append(HOST, HeaderValue::from_static("a"));
            for name in [&own, &HOST, &ACCEPT, &HeaderName::from_static("x-1")] {
                assert_eq!(headers.has(name), headers.contains_key(name), "{name} of {others}");
                assert_eq!(headers.first(name), headers.get(name), "{name} of {others}");
                let all: Vec<_> = headers.every(name).into_iter().flatten().collect();
                assert!(all.into_iter().eq(headers.get_all(name)), "{name} of {others}");
                assert_eq!(headers.repeats(name), *name == own);
            }
            assert_eq!((headers.take(&ACCEPT), headers.take(&own)), (None, Some(HeaderValue::from_static("1"))));
            assert!(!headers.has(&own));
        }
    }
}
