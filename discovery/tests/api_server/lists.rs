//! Lists and watches, and servers that fail in the middle of them.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_streamed_list_goes_over_into_a_watch() {
    let api = with_users().await;
    let mut watched = Watched::of(&api);
    watched.until_endpoints(&["1", "2"]).await;
    assert_eq!(watched.now().health.location, api.url());
    api.put(SLICES, slice("users", &["10.1.0.1", "10.1.0.3"]));
    watched.until_endpoints(&["1", "3"]).await;
    api.put(SLICES, slice("orders", &["10.1.0.9"]));
    watched.until_endpoints(&["9", "1", "3"]).await;
    api.delete(SLICES, "default", "users-1");
    watched.until_endpoints(&["9"]).await;
    assert_eq!((api.count(SLICES, "sendInitialEvents"), api.requests().len()), (1, 3), "{:?}", api.requests());
    assert!(api.count(SLICES, "allowWatchBookmarks=true") == 1 && api.count(SLICES, "NotOlderThan") == 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_are_paged_where_they_are_not_streamed_and_nothing_falls_between_list_and_watch() {
    for ignores in [false, true] {
        let api = KubeApi::start().await;
        for i in 1..=7 {
            api.put(SLICES, slice(&format!("s{i}"), &[&format!("10.1.0.{i}")]));
        }
        api.behave(|behaviour| {
            (behaviour.page, behaviour.watch_list, behaviour.ignores_watch_list) = (3, false, ignores);
        });
        // Between the first page and the second, to an object of the first.
        api.after_page(SLICES, slice("s1", &["10.1.0.99"]));
        let mut watched = Watched::of(&api);
        watched.until_endpoints(&["99", "2", "3", "4", "5", "6", "7"]).await;
        assert_eq!(api.count(SLICES, "limit=500"), 3, "{:?}", api.requests());
        assert_eq!(api.count(SLICES, "continue="), 2);
        assert_eq!(api.count(SLICES, "sendInitialEvents"), 1, "it is not asked for again");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_that_have_expired_are_begun_anew() {
    let api = with_users().await;
    api.put(SLICES, slice("orders", &["10.1.0.9"]));
    api.behave(|behaviour| (behaviour.page, behaviour.watch_list, behaviour.expired_pages) = (1, false, true));
    let mut watched = Watched::of(&api);
    eventually("a second try", || api.count(SLICES, "limit=500") > 3).await;
    assert!(watched.now().objects.is_none());
    api.behave(|behaviour| behaviour.expired_pages = false);
    watched.until_endpoints(&["9", "1", "2"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_resumes_from_its_last_bookmark() {
    let api = with_users().await;
    let mut watched = Watched::of(&api);
    watched.until_endpoints(&["1", "2"]).await;
    // Other objects change: only a bookmark tells a watch how far the world is.
    for _ in 0..10 {
        api.pass();
    }
    api.bookmark();
    api.end_watches();
    api.compact();
    for resource in [SERVICES, SLICES, PODS] {
        eventually("a watch from the bookmark", || api.count(resource, "&resourceVersion=112") == 1).await;
    }
    api.put(SLICES, slice("users", &["10.1.0.3"]));
    watched.until_endpoints(&["3"]).await;
    api.cut_watches();
    api.put(SLICES, slice("users", &["10.1.0.4"]));
    watched.until_endpoints(&["4"]).await;
    assert_eq!([SERVICES, SLICES, PODS].map(|resource| api.lists(resource)), [1, 1, 1], "{:?}", api.requests());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_too_far_back_reads_all_anew() {
    for as_status in [false, true] {
        let mut api = with_users().await;
        api.put(SLICES, slice("orders", &["10.1.0.9"]));
        api.behave(|behaviour| behaviour.gone_as_status = as_status);
        let mut watched = Watched::of(&api);
        watched.until_endpoints(&["9", "1", "2"]).await;
        api.down();
        api.delete(SLICES, "default", "orders-1");
        api.put(SLICES, slice("users", &["10.1.0.5"]));
        api.compact();
        api.up().await;
        watched.until_endpoints(&["5"]).await;
        assert_eq!(api.lists(SLICES), 2, "{:?}", api.requests());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_was_restored_from_a_copy_is_read_anew() {
    let mut api = with_users().await;
    api.put(SLICES, slice("orders", &["10.1.0.9"]));
    let copy = api.version();
    let mut watched = Watched::of(&api);
    watched.until_endpoints(&["9", "1", "2"]).await;
    for last in 3..9 {
        api.put(SLICES, slice("users", &[&format!("10.1.0.{last}")]));
    }
    api.delete(SLICES, "default", "orders-1");
    watched.until_endpoints(&["8"]).await;
    api.down();
    api.restore(copy);
    api.up().await;
    watched.until_endpoints(&["9", "1", "2"]).await;
    // Before it is as far as it was.
    api.put(SLICES, slice("users", &["10.1.0.7"]));
    assert!(api.version() < copy + 7);
    watched.until_endpoints(&["9", "7"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_away_leaves_its_objects_which_are_stale() {
    let mut api = with_users().await;
    let mut watched = Watched::of(&api);
    watched.until_endpoints(&["1", "2"]).await;
    api.down();
    watched.until("stale", |cluster| cluster.health.stale).await;
    let Cluster { objects, health, .. } = watched.now();
    assert_eq!(objects.unwrap().slices.len(), 1);
    assert!(health.error.as_ref().unwrap().contains("onnect"), "{health:?}");
    let since = health.stale_since.unwrap();
    assert!(since.starts_with("20") && since.ends_with('Z'), "{since}");
    api.put(SLICES, slice("users", &["10.1.0.7"]));
    api.up().await;
    watched.until_endpoints(&["7"]).await;
    watched
        .until("all to be well", |cluster| cluster.health.error.is_none() && cluster.health.stale_since.is_none())
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_hangs_is_noticed() {
    let api = with_users().await;
    let mut watched = Watched::of(&api);
    watched.until_endpoints(&["1", "2"]).await;
    // Its connections stay open, and say nothing.
    api.behave(|behaviour| behaviour.hangs = true);
    watched.until("stale", |cluster| cluster.health.stale).await;
    let error = watched.now().health.error.unwrap();
    assert!(error.contains("no answer in 10 s"), "{error}");
    assert_eq!(endpoints(&watched.now()), ["1", "2"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_server_is_waited_for() {
    let api = KubeApi::start().await;
    for i in 1..=9 {
        api.put(SLICES, slice(&format!("s{i}"), &[&format!("10.1.0.{i}")]));
    }
    api.behave(|behaviour| behaviour.delay = Duration::from_millis(100));
    let mut watched = Watched::of(&api);
    watched.until_endpoints(&["1", "2", "3", "4", "5", "6", "7", "8", "9"]).await;
    assert_eq!(api.lists(SLICES), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn lies_are_not_believed_and_the_truth_is_found_again() {
    let api = with_users().await;
    let mut watched = Watched::of(&api);
    watched.until_endpoints(&["1", "2"]).await;
    // An object of another kind.
    api.inject(SLICES, &json!({ "type": "ADDED", "object": service("liar", 80) }).to_string());
    watched
        .until("the lie", |cluster| {
            cluster.health.file_errors.iter().any(|error| error.error.contains("brought a Service"))
        })
        .await;
    for (i, line) in ["<html>busy</html>", r#"{"type":"UNKNOWN","object":{}}"#, "{}", r#"{"type":"ERROR","object":7}"#]
        .iter()
        .enumerate()
    {
        let before = api.count(SLICES, "watch=true");
        api.inject(SLICES, line);
        eventually("a new watch", || api.count(SLICES, "watch=true") > before).await;
        let address = format!("10.1.0.{}", i + 10);
        api.put(SLICES, slice("users", &[&address]));
        watched.until_endpoints(&[&(i + 10).to_string()]).await;
    }
    assert_eq!(api.lists(SLICES), 1, "a lie costs a connection, and no list");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_that_lies_each_time_stays_stale_until_it_does_not() {
    let api = with_users().await;
    let mut watched = Watched::of(&api);
    watched.until_endpoints(&["1", "2"]).await;
    let mut registry = watched.registry.clone();
    let seen = tokio::spawn(async move {
        let mut seen = vec![false];
        while registry.changed().await.is_ok() {
            let stale = registry.borrow_and_update().clusters[0].health.stale;
            if seen.last() != Some(&stale) {
                seen.push(stale);
            }
        }
        seen
    });
    for _ in 0..6 {
        let before = api.count(SLICES, "watch=true");
        let lie_until_there_is_a_new_one = || {
            api.inject(SLICES, "<html>busy</html>");
            api.count(SLICES, "watch=true") > before
        };
        eventually("a new watch", lie_until_there_is_a_new_one).await;
        // Meanwhile all can be listed, and the next watch has begun.
        watched.until("stale", |cluster| cluster.health.stale).await;
    }
    assert_eq!(endpoints(&watched.now()), ["1", "2"]);
    watched.until("a quiet watch", |cluster| !cluster.health.stale).await;
    drop(watched);
    assert_eq!(seen.await.unwrap(), [false, true, false], "it flaps");
}
