//! Requests as somebody hostile would send them: read as what they are, or not at all.

use std::path::Path;

use crate::agent::descriptors;
use crate::wire::{MAX_AGENTS, MOST_DESCRIPTORS, Wanted, request};

const INPUTS: u64 = 200_000;
/// Length of a control message without descriptors.
const HEAD: usize = 16;
/// SOL_SOCKET and SCM_RIGHTS.
const RIGHTS: (i32, i32) = (1, 1);

fn message(kind: u32, agent: u32) -> Vec<u8> {
    [kind.to_ne_bytes(), agent.to_ne_bytes()].concat()
}

/// A request behind the head of its control message.
fn with_descriptors(count: usize, message: &[u8]) -> Vec<u8> {
    let mut bytes = (HEAD + 4 * count).to_ne_bytes().to_vec();
    bytes.extend(RIGHTS.0.to_ne_bytes());
    bytes.extend(RIGHTS.1.to_ne_bytes());
    bytes.extend(message);
    bytes
}

#[test]
fn an_agent_has_a_number_below_the_most() {
    let last = MAX_AGENTS as u32 - 1;
    let wanted = |number| Wanted::of(&message(request::AGENT, number), 1);
    assert_eq!(wanted(1), Some(Wanted::Agent(1)));
    assert_eq!(wanted(last), Some(Wanted::Agent(u64::from(last))));
    for number in [0, last + 1, u32::MAX] {
        assert_eq!(wanted(number), None, "{number}");
    }
}

#[test]
fn a_request_comes_with_its_descriptors() {
    let counts = |kind| -> Vec<usize> {
        (0..=MOST_DESCRIPTORS)
            .filter(|count| Wanted::of(&message(kind, 1), *count).is_some())
            .collect()
    };
    assert_eq!(counts(request::START), [4, 5]);
    assert_eq!(counts(request::AGENT), [1]);
    assert_eq!(counts(request::CLONE), [1, 2]);
    // A word to a restored process; and no request at all.
    assert!(counts(request::GO).is_empty());
    assert!(counts(77).is_empty());
}

#[test]
fn a_request_has_one_length() {
    let mut message = message(request::START, 0);
    message.push(0);
    for length in [0, 1, 4, 7, 9] {
        assert_eq!(Wanted::of(&message[..length], 4), None, "{length}");
    }
    assert_eq!(Wanted::of(&message[..8], 4), Some(Wanted::Start));
}

#[test]
fn no_more_descriptors_are_counted_than_there_is_room_for() {
    let count = |length| descriptors(length, RIGHTS.0, RIGHTS.1);
    assert_eq!([0, 15, 16, 19].map(count), [0; 4]);
    assert_eq!(count(HEAD + 4), 1);
    assert_eq!(count(HEAD + 4 * (MOST_DESCRIPTORS + 1)), MOST_DESCRIPTORS);
    assert_eq!(count(usize::MAX), MOST_DESCRIPTORS);
    // Credentials.
    assert_eq!(descriptors(HEAD + 12, 1, 2), 0);
}

#[test]
fn no_request_brings_reading_down() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus/request");
    let seeds = [
        ("start", 4, message(request::START, 0)),
        ("agent", 1, message(request::AGENT, 3)),
        ("clone", 2, message(request::CLONE, 0)),
        ("rework", 1, message(request::REWORK, 0)),
    ]
    .map(|(name, count, message)| (name, with_descriptors(count, &message)));
    if std::env::var_os("TRENV_WRITE_CORPUS").is_some() {
        for (name, seed) in &seeds {
            std::fs::write(corpus.join(name), seed).unwrap();
        }
    }
    let mut read = 0;
    trenv_fuzz::run(&corpus, &seeds.map(|(_, seed)| seed), INPUTS, |bytes| {
        let Some((head, message)) = bytes.split_first_chunk::<HEAD>() else {
            return;
        };
        let length = usize::from_ne_bytes(head[..8].try_into().unwrap());
        let level = i32::from_ne_bytes(head[8..12].try_into().unwrap());
        let kind = i32::from_ne_bytes(head[12..].try_into().unwrap());
        let count = descriptors(length, level, kind);
        assert!(count <= MOST_DESCRIPTORS);
        let wanted = Wanted::of(message, count);
        read += u32::from(wanted.is_some());
        if let Some(Wanted::Agent(number)) = wanted {
            assert!((1..MAX_AGENTS).contains(&number), "{number}");
        }
    });
    assert!(read > 100, "only {read} inputs could be read");
}
