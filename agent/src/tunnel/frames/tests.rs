use std::time::Duration;

use proptest::prelude::*;

use super::*;

fn frame(kind: u8, length: usize) -> Vec<u8> {
    let mut bytes = u32::try_from(length).unwrap().to_be_bytes()[1..].to_vec();
    bytes.extend([kind, 0, 0, 0, 0, 1]);
    bytes.extend(std::iter::repeat_n(0xff, length));
    bytes
}

/// How many of `frame` a fresh server takes at once, each after `between`.
fn taken(frames: impl Iterator<Item = Vec<u8>>) -> (usize, Option<Flood>) {
    let mut allowance = Allowance::new(Role::Server);
    let now = Instant::now();
    allowance.read(&[0; PREFACE as usize], || now).unwrap();
    let mut count = 0;
    for bytes in frames {
        if let Err(flood) = allowance.read(&bytes, || now) {
            return (count, Some(flood));
        }
        count += 1;
    }
    (count, None)
}

fn many(kind: u8, length: usize) -> (usize, Option<Flood>) {
    taken(std::iter::repeat_n(frame(kind, length), 1_000_000))
}

#[test]
fn each_kind_of_flood_ends_at_its_own_limit() {
    assert_eq!(many(kind::PING, 8), (limits::H2_PINGS.burst as usize, Some(Flood::Pings)));
    assert_eq!(many(kind::SETTINGS, 0), (limits::H2_SETTINGS.burst as usize, Some(Flood::Settings)));
    assert_eq!(many(kind::RST_STREAM, 4), (limits::H2_RESETS.burst as usize, Some(Flood::Resets)));
    assert_eq!(many(kind::WINDOW_UPDATE, 4), (limits::H2_UPDATES.burst as usize, Some(Flood::Updates)));
    let others = (limits::H2_OTHERS.burst as usize, Some(Flood::Others));
    for kind in [2, 5, 7, 10, 16, 0xfa] {
        assert_eq!(many(kind, 5), others, "{kind}");
    }
    assert_eq!(many(kind::DATA, 0), (1_000_000, None));
}

#[test]
fn a_header_block_has_few_continuations_and_a_size() {
    let blocks = |continuations: usize, length: usize| {
        let one = std::iter::once(frame(kind::HEADERS, length))
            .chain(std::iter::repeat_n(frame(kind::CONTINUATION, length), continuations));
        taken((0..100).flat_map(move |_| one.clone())).1
    };
    let most = limits::H2_CONTINUATIONS as usize;
    assert_eq!(blocks(most, 100), None);
    assert_eq!(blocks(most + 1, 100), Some(Flood::Continuations));
    assert_eq!(blocks(most + 1, 0), Some(Flood::Continuations));
    let size = limits::H2_HEADER_BLOCK as usize;
    assert_eq!(blocks(0, size), None);
    assert_eq!(blocks(0, size + 1), Some(Flood::HeaderBlock));
    assert_eq!(blocks(most, size / 2), Some(Flood::HeaderBlock));
}

#[test]
fn every_stream_may_be_reset_and_no_more() {
    let pairs = (0..10_000).flat_map(|_| [frame(kind::HEADERS, 60), frame(kind::RST_STREAM, 4)]);
    assert_eq!(taken(pairs), (20_000, None));
    let twice =
        (0..10_000).flat_map(|_| [frame(kind::HEADERS, 60), frame(kind::RST_STREAM, 4), frame(kind::RST_STREAM, 4)]);
    assert_eq!(taken(twice).1, Some(Flood::Resets));
    // On the client's side a stream costs bytes that were sent.
    let mut allowance = Allowance::new(Role::Client);
    let now = Instant::now();
    for _ in 0..10_000 {
        allowance.wrote(100);
        allowance.read(&frame(kind::RST_STREAM, 4), || now).unwrap();
    }
    let flood = (0..10_000).find_map(|_| allowance.read(&frame(kind::RST_STREAM, 4), || now).err());
    assert_eq!(flood, Some(Flood::Resets));
}

#[test]
fn window_updates_are_earned_by_data() {
    // The worst of the honest: an update of the stream and one of the connection for every small frame.
    let mut allowance = Allowance::new(Role::Client);
    let now = Instant::now();
    let updates = [frame(kind::WINDOW_UPDATE, 4), frame(kind::WINDOW_UPDATE, 4)].concat();
    for _ in 0..1_000_000 {
        allowance.wrote(HEADER + 32);
        allowance.read(&updates, || now).unwrap();
    }
}

#[test]
fn an_honest_peer_pings_for_ever() {
    let mut allowance = Allowance::new(Role::Client);
    let start = Instant::now();
    for second in 0..10_000_u64 {
        let now = start + Duration::from_secs(second);
        for _ in 0..limits::H2_PINGS.per_second {
            allowance.read(&frame(kind::PING, 8), || now).unwrap();
        }
    }
}

#[test]
fn a_connection_that_never_runs_out_of_bytes_gives_others_their_turn() {
    // Zeros are empty frames of data.
    let (mut frames, _alarm) = Frames::new(tokio::io::repeat(0), Role::Client);
    let mut cx = Context::from_waker(std::task::Waker::noop());
    let mut room = vec![0; 16 << 10];
    for turn in 0..3 {
        let mut read = 0;
        loop {
            let mut buf = ReadBuf::new(&mut room);
            match Pin::new(&mut frames).poll_read(&mut cx, &mut buf) {
                Poll::Ready(result) => result.unwrap(),
                Poll::Pending => break,
            }
            read += buf.filled().len();
            assert!(read <= 2 * limits::TURN, "turn {turn} has no end");
        }
        assert!(read >= limits::TURN, "turn {turn} ends after {read} bytes");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// However a stream is cut into pieces, the same frames are seen; and no bytes whatever make it panic.
    #[test]
    fn pieces_make_no_difference(
        frames in prop::collection::vec((any::<u8>(), 0_usize..300), 0..40),
        cuts in prop::collection::vec(0_usize..400, 0..60),
        skip in 0_u32..50,
    ) {
        let mut bytes = vec![0xee; skip as usize];
        for (kind, length) in &frames {
            bytes.extend(frame(*kind, *length));
        }
        let mut scanner = Scanner::new(skip);
        let mut seen = Vec::new();
        let mut rest = &bytes[..];
        for cut in cuts.iter().chain([&usize::MAX]) {
            let (piece, after) = rest.split_at((*cut).min(rest.len()));
            scanner.scan(piece, |frame| { seen.push((frame.kind, frame.length as usize)); Ok::<_, ()>(()) }).unwrap();
            rest = after;
        }
        prop_assert_eq!(seen, frames);
    }

    #[test]
    fn arbitrary_bytes_are_survived(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..50)) {
        let mut allowance = Allowance::new(Role::Server);
        for piece in pieces {
            if allowance.read(&piece, Instant::now).is_err() {
                break;
            }
        }
    }
}
