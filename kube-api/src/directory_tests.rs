use super::*;

/// Longer than a test may take: whoever waits for that has missed an event.
const NEVER: Duration = Duration::from_secs(3600);
const DEADLINE: Duration = Duration::from_secs(20);

fn directory(path: &Path) -> Directory<String> {
    let parse = |text: &str| if text == "bad" { Err("it is bad".to_owned()) } else { Ok(text.to_owned()) };
    Directory::new(path, NEVER, parse).unwrap()
}

fn contents(directory: &Directory<String>) -> Vec<(&str, Option<&str>, Option<&str>)> {
    let name = |path: &'_ Path| path.file_name().unwrap().to_str().unwrap().len();
    directory
        .files()
        .map(|(path, file)| {
            let text = path.to_str().unwrap();
            (&text[text.len() - name(path)..], file.good.as_deref(), file.error.as_deref())
        })
        .collect()
}

/// Reads whenever there is a reason to, until this is there.
async fn until(directory: &mut Directory<String>, expected: &[(&str, Option<&str>, Option<&str>)]) {
    let reached = tokio::time::timeout(DEADLINE, async {
        while contents(directory) != expected || directory.fault().is_some() {
            directory.changed().await;
            directory.read();
        }
    });
    let reached = reached.await.is_ok();
    assert!(reached, "{expected:?} is not reached: {:?} {:?}", contents(directory), directory.fault());
}

#[test]
fn a_file_that_cannot_be_used_keeps_its_last_good_version() {
    let place = tempfile::tempdir().unwrap();
    let mut directory = directory(place.path());
    fs::write(place.path().join("a.yaml"), "one").unwrap();
    fs::write(place.path().join("b.json"), "bad").unwrap();
    fs::write(place.path().join(".hidden.yaml"), "three").unwrap();
    assert!(directory.read(), "the first time");
    let bad = ("b.json", None, Some("it is bad"));
    assert_eq!(contents(&directory), [("a.yaml", Some("one"), None), bad]);
    assert!(!directory.read(), "nothing changed");
    for (text, error) in [(&b"bad"[..], "it is bad"), (b"\xff", "not UTF-8: ")] {
        fs::write(place.path().join("a.yaml"), text).unwrap();
        assert!(directory.read());
        let [(_, Some("one"), Some(found)), _] = contents(&directory)[..] else { panic!("{:?}", contents(&directory)) };
        assert!(found.starts_with(error), "{found}");
    }
    let large = fs::File::create(place.path().join("a.yaml")).unwrap();
    large.set_len(MAX_MANIFEST_BYTES + 1).unwrap();
    assert!(directory.read());
    let [(_, Some("one"), Some(found)), _] = contents(&directory)[..] else { panic!("{:?}", contents(&directory)) };
    assert!(found.contains("split it"), "{found}");
    fs::remove_file(place.path().join("a.yaml")).unwrap();
    assert!(directory.read());
    assert_eq!(contents(&directory), [bad]);
}

#[test]
fn a_link_to_nothing_is_told() {
    let place = tempfile::tempdir().unwrap();
    let target = place.path().join("target");
    let mut directory = directory(place.path());
    std::os::unix::fs::symlink(&target, place.path().join("a.yaml")).unwrap();
    assert!(directory.read());
    let nothing = Some("a symbolic link to nothing");
    assert_eq!(contents(&directory), [("a.yaml", None, nothing)]);
    fs::write(&target, "one").unwrap();
    assert!(directory.read());
    assert_eq!(contents(&directory), [("a.yaml", Some("one"), None)]);
    fs::remove_file(&target).unwrap();
    assert!(directory.read());
    assert_eq!(contents(&directory), [("a.yaml", Some("one"), nothing)]);
    assert!(!directory.read(), "said once");
    fs::remove_file(place.path().join("a.yaml")).unwrap();
    assert!(directory.read());
    assert_eq!(contents(&directory), []);
}

#[tokio::test]
async fn a_directory_that_comes_and_goes_keeps_its_files_and_is_watched_again() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("pods");
    let mut directory = directory(&path);
    assert!(directory.read());
    assert!(directory.fault().is_some_and(|fault| fault.starts_with("cannot read the directory")));
    fs::create_dir(&path).unwrap();
    fs::write(path.join("a.yaml"), "1").unwrap();
    until(&mut directory, &[("a.yaml", Some("1"), None)]).await;
    // It is watched by now: nothing else wakes.
    fs::write(path.join("a.yaml"), "2").unwrap();
    until(&mut directory, &[("a.yaml", Some("2"), None)]).await;

    fs::rename(&path, place.path().join("aside")).unwrap();
    directory.changed().await;
    assert!(directory.read());
    assert!(directory.fault().is_some());
    assert_eq!(contents(&directory), [("a.yaml", Some("2"), None)], "it stays in force");
    fs::create_dir(&path).unwrap();
    until(&mut directory, &[]).await;
    fs::write(path.join("b.yaml"), "3").unwrap();
    until(&mut directory, &[("b.yaml", Some("3"), None)]).await;
}

#[tokio::test]
async fn a_directory_that_is_replaced_between_two_looks_is_watched_anew() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("pods");
    fs::create_dir(&path).unwrap();
    let mut directory = directory(&path);
    directory.read();
    for round in ["1", "2", "3"] {
        fs::rename(&path, place.path().join(format!("aside-{round}"))).unwrap();
        fs::create_dir(&path).unwrap();
        fs::write(path.join("a.yaml"), format!("first {round}")).unwrap();
        until(&mut directory, &[("a.yaml", Some(&format!("first {round}")), None)]).await;
        fs::write(path.join("a.yaml"), format!("second {round}")).unwrap();
        until(&mut directory, &[("a.yaml", Some(&format!("second {round}")), None)]).await;
    }
    // Removed, and so perhaps with the same number again.
    fs::remove_dir_all(&path).unwrap();
    fs::create_dir(&path).unwrap();
    until(&mut directory, &[]).await;
    fs::write(path.join("b.yaml"), "here").unwrap();
    until(&mut directory, &[("b.yaml", Some("here"), None)]).await;
}

fn event(kind: EventKind, path: &str) -> notify::Event {
    notify::Event::new(kind).add_path(path.into())
}

const DATA: EventKind = EventKind::Modify(ModifyKind::Data(notify::event::DataChange::Any));
const CLOSED: EventKind = EventKind::Access(AccessKind::Close(AccessMode::Write));
const OPENED: EventKind = EventKind::Access(AccessKind::Open(AccessMode::Any));
const RESCAN: Duration = Duration::from_secs(30);

/// How long until the directory is read, when these events come at these times.
async fn read_after(events: &[(u64, EventKind)]) -> Duration {
    let (sender, mut inbox) = mpsc::channel(16);
    let events: Vec<_> =
        events.iter().map(|(at, kind)| (Duration::from_millis(*at), event(*kind, "/m/a.yaml"))).collect();
    let started = Instant::now();
    tokio::spawn(async move {
        for (at, event) in events {
            sleep_until(started + at).await;
            sender.send(Ok(event)).await.unwrap();
        }
        std::future::pending::<()>().await;
    });
    assert_eq!(wait_for_change(&mut inbox, RESCAN).await, Wake::Read);
    started.elapsed()
}

#[tokio::test(start_paused = true)]
async fn half_a_write_is_not_an_edit() {
    let ms = Duration::from_millis;
    // The clock has a resolution of a millisecond.
    let about = |found: Duration, expected: Duration| found >= expected && found <= expected + ms(2);
    assert!(about(read_after(&[(0, CLOSED)]).await, DEBOUNCE));
    assert!(about(read_after(&[(0, DATA), (5, CLOSED)]).await, ms(5) + DEBOUNCE));
    assert!(about(read_after(&[(0, DATA), (400, DATA), (700, CLOSED)]).await, ms(700) + DEBOUNCE));
    // A writer that never closes its file does not hold up the others for ever.
    assert!(about(read_after(&[(0, DATA), (400, DATA)]).await, WRITER_PATIENCE));
    // Nor does one that never stops.
    let stream: Vec<_> = (0..200).flat_map(|i| [(i * 10, DATA), (i * 10 + 1, CLOSED)]).collect();
    assert!(read_after(&stream).await <= WRITER_PATIENCE + ms(2));
    // Reading causes events too, which are no reason to read.
    assert!(about(read_after(&[(0, OPENED)]).await, RESCAN));
}

#[test]
fn bursts_of_a_file_that_is_written_wait_for_it_to_be_closed() {
    let mut writing = BTreeSet::new();
    let mut wake = Wake::Read;
    assert!(!note_event(&event(OPENED, "/m/a.yaml"), &mut writing, &mut wake));
    assert!(note_event(&event(DATA, "/m/a.yaml"), &mut writing, &mut wake));
    assert_eq!(writing.len(), 1);
    assert!(note_event(&event(CLOSED, "/m/a.yaml"), &mut writing, &mut wake));
    assert_eq!((writing.len(), wake), (0, Wake::Read));
}
