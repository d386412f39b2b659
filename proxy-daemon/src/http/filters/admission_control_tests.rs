use super::*;

fn counts(requests: u32, successes: u32) -> Counts {
    Counts { requests, successes }
}

#[test]
fn the_probability_is_that_of_the_documentation() {
    for (counts, threshold, aggression, most, expected) in [
        (counts(0, 0), 0.95, 1.0, 0.8, 0.0),
        (counts(99, 0), 0.95, 1.0, 0.8, 0.8),
        (counts(99, 0), 0.95, 1.0, 1.0, 0.99),
        (counts(99, 95), 0.95, 1.0, 1.0, 0.0),
        (counts(99, 99), 0.95, 1.0, 1.0, 0.0),
        (counts(99, 19), 0.5, 1.0, 1.0, 0.61),
        (counts(99, 19), 0.5, 2.0, 1.0, 0.61_f64.sqrt()),
        (counts(99, 0), 0.0, 1.0, 1.0, 0.0),
    ] {
        let seen = counts.rejection(threshold, aggression, most);
        if threshold > 0.0 {
            assert!((seen - expected).abs() < 1e-9, "{counts:?} {threshold} {aggression} {most}: {seen}");
        }
        // A threshold of 0 is no number's divisor.
        assert!((0.0..=most).contains(&seen), "{counts:?}: {seen}");
    }
}

#[test]
fn what_is_older_than_the_window_is_forgotten() {
    let (began, window) = (Instant::now(), Duration::from_secs(3));
    let at = |milliseconds| began + Duration::from_millis(milliseconds);
    let mut seen = Window::default();
    seen.record(true, at(0), window);
    seen.record(false, at(999), window);
    seen.record(false, at(1000), window);
    assert_eq!((seen.slices.len(), seen.all), (2, counts(3, 1)));
    seen.advance(at(2999), window);
    assert_eq!(seen.all, counts(3, 1));
    // With the slice goes all that was counted in it.
    seen.advance(at(3000), window);
    assert_eq!(seen.all, counts(1, 0));
    seen.advance(at(10_000), window);
    assert_eq!((seen.slices.len(), seen.all), (1, counts(0, 0)));
}

#[test]
fn requests_a_second_are_those_of_the_whole_window() {
    let (began, window) = (Instant::now(), Duration::from_secs(10));
    let mut seen = Window::default();
    assert_eq!(seen.average_rps(began, window), 0);
    (0..59).for_each(|_| seen.record(true, began, window));
    assert_eq!(seen.average_rps(began, window), 5);
    seen.record(true, began, window);
    assert_eq!(seen.average_rps(began, window), 6);
    assert_eq!(seen.average_rps(began + Duration::from_secs(20), window), 3);
}
