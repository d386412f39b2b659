use super::*;

fn keys(seeds: &[u8]) -> Arc<SessionTicketKeys> {
    let keys = seeds.iter().map(|seed| TicketKey::new(&[*seed; KEY]).unwrap());
    Arc::new(SessionTicketKeys { keys: keys.collect() })
}

fn tickets(seeds: &[u8], binding: u8) -> KeyedTickets {
    KeyedTickets::new(keys(seeds), [binding; 32], None)
}

#[test]
fn the_first_key_encrypts_and_all_decrypt() {
    let old = tickets(&[1], 0).encrypt(b"session").unwrap();
    assert_eq!(old[..NAME], [1; NAME]);
    let rotated = tickets(&[2, 1], 0);
    assert_eq!(rotated.decrypt(&old).unwrap(), b"session");
    let new = rotated.encrypt(b"session").unwrap();
    assert_eq!(new[..NAME], [2; NAME]);
    assert_eq!(rotated.decrypt(&new).unwrap(), b"session");
    assert_eq!(tickets(&[1], 0).decrypt(&new), None);
    assert_eq!(tickets(&[2], 0).decrypt(&old), None);
    assert_ne!(rotated.encrypt(b"session").unwrap(), new, "never the same twice");
}

#[test]
fn a_ticket_is_good_for_one_context() {
    let ticket = tickets(&[1], 7).encrypt(b"session").unwrap();
    assert_eq!(tickets(&[1], 7).decrypt(&ticket).unwrap(), b"session");
    assert_eq!(tickets(&[1], 8).decrypt(&ticket), None);
}

#[test]
fn what_was_tampered_with_is_no_ticket() {
    let tickets = tickets(&[1], 0);
    let ticket = tickets.encrypt(b"session").unwrap();
    for at in 0..ticket.len() {
        let mut other = ticket.clone();
        other[at] ^= 1;
        assert_eq!(tickets.decrypt(&other), None, "{at}");
        assert_eq!(tickets.decrypt(&ticket[..at]), None, "{at}");
    }
    assert_eq!(tickets.decrypt(&[ticket, vec![0]].concat()), None);
}

#[test]
fn a_session_grows_old() {
    let age = Age(Duration::from_secs(100));
    let made = |ago: u64| [&(now() - ago).to_be_bytes()[..], b"session"].concat();
    assert_eq!(age.fresh(made(90)).unwrap(), b"session");
    assert_eq!(age.fresh(made(102)), None);
    assert_eq!(age.fresh(vec![0; 7]), None);
    assert_eq!(age.hint(), 100);
    assert_eq!(Age(Duration::MAX).hint(), LONGEST_HINT);
    assert_eq!(Age(Duration::from_secs(1)).fresh(Age::stamped(b"x")).unwrap(), b"x");
}

#[test]
fn keys_have_eighty_bytes_and_are_not_shown() {
    let error = TicketKey::new(&[0; 48]).unwrap_err();
    assert_eq!(error, "Incorrect TLS session ticket key length. Length 48, expected length 80.");
    assert_eq!(format!("{:?}", keys(&[65]).keys[0]), "TicketKey { .. }");
}
