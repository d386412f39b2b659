use envoy_types::pb::google::protobuf::UInt64Value;
use http_body_util::BodyExt as _;

use super::*;
use crate::http::buffered::Buffered;

fn filter(name: &str, mode: EnableMode) -> BandwidthLimitFilter {
    let config = BandwidthLimit {
        stat_prefix: name.to_owned(),
        enable_mode: mode.into(),
        limit_kbps: Some(UInt64Value { value: 10 }),
        enable_response_trailers: true,
        response_trailer_prefix: "x".to_owned(),
        ..BandwidthLimit::default()
    };
    BandwidthLimitFilter { configured: Shared::new(configured(&config, "c").unwrap()).keep(), delays: Rc::default() }
}

/// A body that has come whole, with trailers.
fn body(bytes: usize) -> Body {
    let trailers = HeaderMap::from_iter([(http::header::ETAG, http::HeaderValue::from_static("e"))]);
    Body::Wrapped(Box::new(Buffered::new(vec![b'x'; bytes].into(), Some(trailers))))
}

/// The sizes of what passes, each with when, in milliseconds; and the trailers.
async fn passes(mut body: Body) -> (Vec<(u128, usize)>, HeaderMap) {
    let (began, mut pieces, mut trailers) = (tokio::time::Instant::now(), Vec::new(), HeaderMap::new());
    while let Some(frame) = body.frame().await {
        match frame.unwrap().into_data() {
            Ok(data) => pieces.push((began.elapsed().as_millis(), data.len())),
            Err(frame) => trailers = frame.into_trailers().unwrap(),
        }
    }
    (pieces, trailers)
}

/// Of 10 KiB a second 512 bytes come with every fill of 50 ms; the clock of a timer goes on by whole milliseconds.
fn is_steady(pieces: &[(u128, usize)]) {
    let mut before = 0;
    for (at, size) in pieces {
        assert!((50..=52).contains(&(at - before)), "after {} ms: {pieces:?}", at - before);
        assert!((500..=540).contains(size), "{size}: {pieces:?}");
        before = *at;
    }
}

#[tokio::test(start_paused = true)]
async fn responses_pass_at_the_rate_and_trailers_tell_how_long_they_took() {
    let filter = filter("responses", EnableMode::Response);
    let stats = filter.configured.response;
    let mut limited = body(20 * 1024);
    filter.limit(&mut limited, true);
    let (pieces, trailers) = passes(limited).await;
    assert_eq!(pieces[0], (0, 10 * 1024), "what there is at once");
    let (last, steady) = pieces[1..].split_last().unwrap();
    is_steady(steady);
    assert!((950..=1050).contains(&last.0), "{last:?}");
    assert_eq!(pieces.iter().map(|(_, size)| size).sum::<usize>(), 20 * 1024);
    assert_eq!((stats.pending.value(), stats.incoming_total_size.value()), (0, 20 * 1024));
    assert_eq!(stats.allowed_total_size.value(), 20 * 1024);
    assert_eq!(stats.enforced.value(), pieces.len() as u64 - 1);
    let told = |name: &str| trailers.get(name).map(|value| value.to_str().unwrap().parse::<u64>().unwrap());
    assert!((950..=1050).contains(&told("x-bandwidth-response-delay-ms").unwrap()), "{trailers:?}");
    assert_eq!(told("x-bandwidth-response-filter-delay-ms"), Some(50 * stats.enforced.value()));
    assert_eq!((told("x-bandwidth-request-delay-ms"), told("x-bandwidth-request-filter-delay-ms")), (None, None));
    assert_eq!(trailers["etag"], "e");
}

#[tokio::test(start_paused = true)]
async fn all_bodies_of_a_direction_share_the_rate_and_responses_tell_of_requests() {
    let filter = filter("requests", EnableMode::RequestAndResponse);
    let stats = filter.configured.request;
    let (mut first, mut second) = (body(10 * 1024), body(1024));
    filter.limit(&mut first, false);
    assert_eq!(passes(first).await.0, [(0, 10 * 1024)]);
    filter.limit(&mut second, false);
    let mut begun = Box::pin(passes(second));
    assert!(futures_util::poll!(begun.as_mut()).is_pending());
    assert_eq!((stats.pending.value(), stats.incoming_size.value(), stats.allowed_size.value()), (1, 1024, 0));
    let (pieces, trailers) = begun.await;
    is_steady(&pieces[..1]);
    assert!((100..=155).contains(&pieces.last().unwrap().0), "{pieces:?}");
    assert_eq!(trailers.len(), 1, "only responses' trailers tell");
    let mut response = body(16);
    filter.limit(&mut response, true);
    let (_, trailers) = passes(response).await;
    let told = |name: &str| trailers.get(name).map(|value| value.to_str().unwrap().parse::<u64>().unwrap());
    assert!((100..=155).contains(&told("x-bandwidth-request-delay-ms").unwrap()), "{trailers:?}");
    assert!(told("x-bandwidth-request-filter-delay-ms").is_some_and(|delay| delay >= 100), "{trailers:?}");
}

#[tokio::test(start_paused = true)]
async fn a_body_that_breaks_off_is_no_longer_pending() {
    let filter = filter("broken", EnableMode::Response);
    let mut limited = body(11 * 1024);
    filter.limit(&mut limited, true);
    limited.frame().await.unwrap().unwrap();
    assert_eq!(filter.configured.response.pending.value(), 1);
    drop(limited);
    assert_eq!(filter.configured.response.pending.value(), 0);
}
