//! The backlog against a model: whatever happens to it, the receiver sees every change once and in order, or is told that it cannot.

use std::collections::HashMap;

use bytes::Bytes;
use proptest::prelude::*;

use super::*;

fn write(len: usize) -> ChangeKind {
    ChangeKind::Write { offset: 0, data: Bytes::from(vec![0; len]) }
}

fn numbered(number: u64, len: usize) -> ChangeKind {
    let mut data = vec![0; len];
    data[..8].copy_from_slice(&number.to_le_bytes());
    ChangeKind::Write { offset: 0, data: Bytes::from(data) }
}

fn memory(bytes: u64) -> Room {
    Room { memory: bytes, log: 0 }
}

#[test]
fn a_full_backlog_refuses_writes_and_takes_markers() {
    let mut backlog = Backlog::new(1, memory(10_000));
    assert_eq!(backlog.push(write(8000), Mono(0)), Ok(1));
    assert_eq!(backlog.push(write(8000), Mono(0)), Err(Full));
    let marker = crate::model::Marker::sample(1, &[]);
    assert_eq!(backlog.push(ChangeKind::Mark(Box::new(marker)), Mono(0)), Ok(2));
}

#[test]
fn lag_is_the_age_of_the_oldest_unsafe_change() {
    let mut backlog = Backlog::new(1, memory(1 << 20));
    backlog.push(write(512), Mono(1_000_000)).unwrap();
    backlog.push(write(512), Mono(2_000_000)).unwrap();
    assert_eq!(backlog.lag(Mono(3_000_000)), Duration::from_secs(2));
    backlog.take_next(u64::MAX);
    backlog.take_next(u64::MAX);
    backlog.acknowledge(1, 1, 1);
    assert_eq!(backlog.lag(Mono(3_000_000)), Duration::from_secs(1));
    backlog.acknowledge(1, 2, 2);
    assert_eq!(backlog.lag(Mono(3_000_000)), Duration::ZERO);
    assert_eq!((backlog.bytes(), backlog.memory_bytes()), (0, 0));
}

#[test]
fn a_stream_that_moved_does_not_go_on_below_where_it_began() {
    let mut backlog = Backlog::new(4, memory(1 << 20));
    for _ in 0..5 {
        backlog.push(write(512), Mono(0)).unwrap();
        backlog.take_next(u64::MAX).unwrap();
    }
    backlog.begin_move(5);
    assert_eq!(backlog.take_over(Position::new(4, 3)), Ok(()));
    backlog.begin_move(6);
    assert_eq!(backlog.take_over(Position::new(4, 2)), Err(CannotResume), "the master target lost what it had");
    assert_eq!(backlog.take_over(Position::new(4, 3)), Ok(()), "nothing of the epoch in between had arrived");
    assert_eq!(backlog.resume(2, None), Err(CannotResume), "nothing was sent of this one yet");
    assert_eq!(backlog.resume(1, Some(Position::new(4, 3))), Ok(()), "nothing of this one has arrived yet");
    assert_eq!(backlog.resume(1, Some(Position::new(4, 2))), Err(CannotResume), "it began behind what the master target lost since");
}

#[test]
fn what_is_cached_is_sent_again_until_it_is_safe_and_gives_way_when_there_is_no_room() {
    let mut backlog = Backlog::new(1, memory(1 << 20));
    for _ in 0..3 {
        backlog.push(write(300 << 10), Mono(0)).unwrap();
        backlog.take_next(u64::MAX).unwrap();
    }
    backlog.acknowledge(1, 3, 1);
    assert_eq!(backlog.bytes(), 0);
    assert_eq!(backlog.resume(1, None), Err(CannotResume), "that is safe: whoever lost it must say so otherwise");
    assert_eq!(backlog.resume(2, None), Ok(()));
    assert_eq!(backlog.take_next(u64::MAX).unwrap().0.sequence, 2);
    assert_eq!(backlog.take_next(u64::MAX).unwrap().0.sequence, 3);
    assert_eq!(backlog.resume(5, None), Err(CannotResume), "never made");
    backlog.acknowledge(1, 3, 1);
    backlog.push(write(300 << 10), Mono(0)).unwrap();
    backlog.push(write(300 << 10), Mono(0)).unwrap();
    assert_eq!(backlog.resume(2, None), Err(CannotResume), "it made room for what is not even cached");
    assert_eq!(backlog.resume(4, None), Ok(()));
}

#[test]
fn another_process_server_is_sent_what_only_the_dead_one_had() {
    let mut backlog = Backlog::new(4, memory(1 << 20));
    for _ in 0..6 {
        backlog.push(write(4096), Mono(0)).unwrap();
        backlog.take_next(u64::MAX).unwrap();
    }
    backlog.acknowledge(4, 5, 2);
    backlog.begin_move(5);
    assert!(backlog.take_next(u64::MAX).is_none());
    assert_eq!(backlog.push(write(4096), Mono(0)), Ok(7), "nobody waits");
    backlog.acknowledge(4, 6, 6);
    assert_eq!(backlog.safe(), 2, "an old acknowledgement");
    assert_eq!(backlog.take_over(Position::new(4, 3)), Ok(()));
    let resent: Vec<u64> = std::iter::from_fn(|| backlog.take_next(u64::MAX)).map(|(c, _)| c.sequence).collect();
    assert_eq!(resent, [1, 2, 3, 4], "changes 4 to 7 in the new epoch");
    backlog.acknowledge(5, 4, 4);
    assert_eq!((backlog.safe(), backlog.number(4)), (7, 7));
    backlog.begin_move(6);
    assert_eq!(backlog.take_over(Position::new(4, 3)), Err(CannotResume), "the master target lost what was safe");
    assert_eq!(backlog.take_over(Position::new(7, 0)), Err(CannotResume), "somebody else was there");
}

#[test]
fn a_move_that_is_tried_twice_goes_on_where_the_last_stream_stood() {
    let mut backlog = Backlog::new(1, memory(1 << 20));
    backlog.push(write(4096), Mono(0)).unwrap();
    backlog.take_next(u64::MAX).unwrap();
    backlog.begin_move(2);
    backlog.begin_move(3);
    assert_eq!(backlog.epoch(), 3);
    assert_eq!(backlog.take_over(Position::new(0, 0)), Ok(()), "nothing of it had arrived");
    assert_eq!(backlog.take_next(u64::MAX).unwrap().0.sequence, 1);
}

/// What stands in for the log.
#[derive(Default)]
struct Log {
    next: u64,
    records: HashMap<u64, (SegmentName, Vec<Held>)>,
}

/// A receiver that may lose what it has, and the changes that are truly expected.
#[derive(Default)]
struct Receiver {
    epoch: u64,
    /// Number of the last change received, durable, and journaled at the master target.
    received: u64,
    durable: u64,
    safe: u64,
    base: u64,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Pushed, sent, spilled, read back, acknowledged, resumed and moved in any order: each change arrives once in order with
    /// its own content, and what cannot be continued is refused, never skipped.
    #[test]
    fn the_receiver_never_sees_a_gap(ops in proptest::collection::vec((0u8..9, 1usize..60_000, any::<bool>()), 1..300), log_room in prop_oneof![Just(0u64), Just(1u64 << 20), Just(1u64 << 30)]) {
        let mut backlog = Backlog::new(1, Room { memory: 2 << 20, log: log_room });
        let mut log = Log::default();
        let mut there = Receiver { epoch: 1, ..Receiver::default() };
        let mut made = 0;
        let mut leaving: Vec<(SegmentName, Vec<Held>)> = Vec::new();
        for (op, len, flag) in ops {
            match op {
                0..=2 => if backlog.push(numbered(made + 1, len.max(8)), Mono(0)).is_ok() { made += 1; },
                3 => {
                    for _ in 0..len % 40 {
                        if let Some((name, location)) = backlog.wants() {
                            let (_, changes) = log.records.get(&location.stored_bytes()).cloned().unwrap();
                            prop_assert!(backlog.loaded(name, changes));
                        }
                        let Some((change, _)) = backlog.take_next(u64::MAX) else { break };
                        let number = there.base + change.sequence;
                        prop_assert!(number <= there.received + 1, "a gap: {} after {}", number, there.received);
                        if let ChangeKind::Write { data, .. } = &change.kind {
                            prop_assert_eq!(u64::from_le_bytes(data[..8].try_into().unwrap()), number);
                        }
                        there.received = there.received.max(number);
                    }
                }
                4 => {
                    there.durable = there.received;
                    if flag { there.safe = there.durable - (len as u64 % 5).min(there.durable - there.safe); }
                    backlog.acknowledge(there.epoch, there.durable - there.base, there.safe - there.base);
                }
                // The process server loses what was not durable, or everything that the master target has not, and comes back.
                5 => {
                    if flag { there.durable = there.safe; }
                    there.received = there.durable;
                    if backlog.resume(there.durable - there.base + 1, None).is_err() {
                        // Everything again, by the map.
                        there.epoch += 1;
                        backlog.restart(there.epoch, false);
                        (there.received, there.durable, there.safe, there.base) = (made, made, made, made);
                    }
                }
                6 => {
                    backlog.begin_move(there.epoch + 1);
                    if flag { backlog.push(numbered(made + 1, 512), Mono(0)).is_ok().then(|| made += 1); }
                    // The master target may have journaled more than it acknowledged.
                    let stands = there.safe + (len as u64 % 3).min(there.received - there.safe);
                    let moved = backlog.take_over(Position::new(there.epoch, stands - there.base));
                    there.epoch += 1;
                    match moved {
                        Ok(()) => (there.received, there.durable, there.safe, there.base) = (stands, stands, stands, stands),
                        Err(_) => {
                            there.epoch += 1;
                            backlog.restart(there.epoch, false);
                            (there.received, there.durable, there.safe, there.base) = (made, made, made, made);
                        }
                    }
                }
                7 => while let Some(segment) = backlog.spill() { leaving.push(segment); },
                _ => for (name, changes) in leaving.drain(..) {
                    log.next += 1;
                    // The place is only a name here: its length names the record.
                    let place = Location::of_length(log.next * 4096);
                    log.records.insert(place.stored_bytes(), (name, changes));
                    backlog.spilled(name, flag.then_some(place));
                },
            }
            for gone in backlog.take_given_up() {
                log.records.remove(&gone.stored_bytes());
            }
            prop_assert!(backlog.memory_bytes() <= 2 << 20);
            prop_assert!(backlog.log_bytes() <= log_room);
        }
    }
}

#[test]
fn a_stream_that_flows_holds_next_to_nothing() {
    let mut backlog = Backlog::new(1, Room { memory: 1 << 20, log: 0 });
    for n in 1..=2000 {
        assert_eq!(backlog.push(write(60_000), Mono(0)), Ok(n), "room for {n}");
        backlog.take_next(u64::MAX).unwrap();
        let safe = n.saturating_sub(4);
        backlog.acknowledge(1, n - 1, safe);
        assert!(backlog.memory_bytes() < 1 << 20);
    }
    backlog.acknowledge(1, 2000, 2000);
    assert_eq!(backlog.memory_bytes(), 0);
}

#[test]
fn what_became_of_a_change_is_known_over_moves_and_new_streams() {
    let mut backlog = Backlog::new(1, memory(1 << 20));
    let push = |backlog: &mut Backlog| backlog.push(write(512), Mono(0)).unwrap();
    let (first, second) = (push(&mut backlog), push(&mut backlog));
    (0..2).for_each(|_| drop(backlog.take_next(u64::MAX).unwrap()));
    backlog.acknowledge(1, 2, 1);
    assert_eq!((backlog.fate(first), backlog.fate(second)), (Fate::Safe, Fate::Waits));
    // At another process server it is still the same change.
    backlog.begin_move(2);
    backlog.take_over(Position::new(1, 1)).unwrap();
    assert_eq!((backlog.fate(first), backlog.fate(second)), (Fate::Safe, Fate::Waits));
    backlog.restart(3, false);
    let third = push(&mut backlog);
    assert_eq!([first, second, third].map(|n| backlog.fate(n)), [Fate::Safe, Fate::Lost, Fate::Waits]);
    backlog.take_next(u64::MAX).unwrap();
    backlog.acknowledge(3, 1, 1);
    assert_eq!([first, second, third].map(|n| backlog.fate(n)), [Fate::Safe, Fate::Lost, Fate::Safe]);
    backlog.restart(4, false);
    assert_eq!(backlog.fate(third), Fate::Safe, "nothing was forgotten");
    backlog.restart(5, true);
    assert_eq!(backlog.fate(third), Fate::Lost, "the master target has lost what it had");
}
