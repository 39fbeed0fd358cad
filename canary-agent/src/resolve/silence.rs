//! Which neighbours have stopped answering.
//!
//! The kernel takes a neighbour for gone after several questions of its own, seconds apart, and
//! begins with them half a minute after the last answer. Ours come twice a second: whoever leaves
//! one unanswered is asked quickly some more, and is silent after a row of them.
//!
//! A question that nobody answers says nothing by itself: this host may have had no time, or its
//! link may be broken. So others are asked at the same time, and a question counts only if one of
//! them has answered it meanwhile, and if we came to look in time. While nobody at all answers,
//! nobody is silent. Nor is one that has never answered a question of ours, or that is known to be
//! alive though it does not answer.
//!
//! Pure: time is handed in. Must not know of sockets.

use std::{
    collections::{BTreeSet, HashMap},
    time::{Duration, Instant},
};

use super::wire::NeighbourKey;

/// How long an answer may take. A neighbour answers in its kernel: a tenth of a millisecond.
const GRACE: Duration = Duration::from_millis(50);
/// Looking later than this means that this host is short of time, and its neighbour may be, too.
const LATE: Duration = Duration::from_millis(50);
/// So many questions in a row that others answer and one doesn't. With the time from one round of
/// questions to the next that is a second since the last answer at the very most.
const QUESTIONS: u32 = 4;
/// How many questions follow quickly on one without an answer, if it takes all of them. The next
/// are asked in their turn.
const FOLLOW_UPS: u32 = 8;
/// Who speaks up so soon after it was taken for silent only took its time.
const TOO_SOON: Duration = Duration::from_millis(150);
/// How often whoever did so is given twice as many questions.
const DOUBLINGS: u32 = 3;
/// So many others are asked besides those in doubt.
const WITNESSES: usize = 3;
/// When nobody has answered for so long, somebody should be told.
const NOBODY: Duration = Duration::from_secs(3);

#[derive(Clone, Copy, Debug, Default)]
struct Neighbour {
    /// The open question: when it was sent.
    asked: Option<Instant>,
    /// When it last answered. One that never has may not take our questions at all.
    heard: Option<Instant>,
    /// When the first question was sent of those that it has left without an answer since.
    quiet: Option<Instant>,
    /// How many of those count.
    unanswered: u32,
    /// How many questions have followed quickly on the last one that was asked in its turn.
    follow_ups: u32,
    /// Since when it is silent.
    silent: Option<Instant>,
    /// How often that was wrong.
    doublings: u32,
}

impl Neighbour {
    fn is_well(&self) -> bool {
        self.heard.is_some() && self.quiet.is_none() && self.silent.is_none()
    }
}

/// What follows from the questions whose time is over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Judgement {
    /// Some are silent from now on, or it is news that nobody answers.
    pub(super) news: bool,
    /// To be asked at once: those in doubt, with whatever may reach them.
    pub(super) doubted: Vec<NeighbourKey>,
    /// To be asked with them.
    pub(super) witnesses: Vec<NeighbourKey>,
}

/// The neighbours that are asked, and what has become of the questions.
#[derive(Clone, Debug, Default)]
pub(super) struct Silence {
    neighbours: HashMap<NeighbourKey, Neighbour>,
    /// Open questions by the time at which their answer is due.
    open: BTreeSet<(Instant, NeighbourKey)>,
    /// The last two that have answered, and when.
    heard: [Option<(NeighbourKey, Instant)>; 2],
    nobody: bool,
}

impl Silence {
    /// Takes note of a question that was sent.
    pub(super) fn asked(&mut self, key: NeighbourKey, now: Instant) {
        let neighbour = self.neighbours.entry(key).or_default();
        if neighbour.asked.is_none() {
            neighbour.asked = Some(now);
            self.open.insert((now + GRACE, key));
        }
    }

    /// Takes in an answer. Says whether that is news.
    pub(super) fn answered(&mut self, key: NeighbourKey, now: Instant) -> bool {
        let Some(neighbour) = self.neighbours.get_mut(&key) else {
            return false;
        };
        let doublings = match neighbour.silent {
            Some(since) if now < since + TOO_SOON => (neighbour.doublings + 1).min(DOUBLINGS),
            Some(_) => 0,
            None => neighbour.doublings,
        };
        if let Some(asked) = neighbour.asked {
            self.open.remove(&(asked + GRACE, key));
        }
        let was_silent = neighbour.silent.is_some();
        *neighbour = Neighbour { heard: Some(now), doublings, ..Neighbour::default() };
        if !matches!(self.heard[0], Some((last, _)) if last == key) {
            self.heard[1] = self.heard[0];
        }
        self.heard[0] = Some((key, now));
        was_silent | std::mem::take(&mut self.nobody)
    }

    /// Takes in that a neighbour is alive, as something else than an answer shows. Says whether
    /// that is news.
    pub(super) fn alive(&mut self, key: NeighbourKey) -> bool {
        let Some(neighbour) = self.neighbours.get_mut(&key) else {
            return false;
        };
        (neighbour.quiet, neighbour.unanswered, neighbour.follow_ups) = (None, 0, 0);
        let was_silent = neighbour.silent.take().is_some();
        if was_silent {
            // It does not take our questions any more, and would be silent again at once.
            neighbour.heard = None;
        }
        was_silent | std::mem::take(&mut self.nobody)
    }

    /// Judges the questions whose time is over. All answers that have come must be taken in
    /// before. At most `limit` are asked at once, the others when it is their turn.
    pub(super) fn judge(&mut self, now: Instant, limit: usize) -> Judgement {
        let mut judgement = Judgement::default();
        let mut unanswered = false;
        while let Some(&(due, key)) = self.open.first()
            && due <= now
        {
            self.open.pop_first();
            let heard = self.heard;
            let Some(neighbour) = self.neighbours.get_mut(&key) else { continue };
            let Some(asked) = neighbour.asked.take() else { continue };
            if neighbour.heard.is_none() || neighbour.silent.is_some() {
                continue;
            }
            if now < due + LATE {
                unanswered = true;
                neighbour.quiet.get_or_insert(asked);
                let others = heard.into_iter().flatten().filter(|(other, _)| *other != key);
                if others.into_iter().any(|(_, at)| at >= asked) {
                    neighbour.unanswered += 1;
                }
            }
            if neighbour.unanswered >= QUESTIONS << neighbour.doublings {
                neighbour.silent = Some(now);
                judgement.news = true;
            } else if neighbour.follow_ups < FOLLOW_UPS << neighbour.doublings
                && judgement.doubted.len() < limit
            {
                neighbour.follow_ups += 1;
                judgement.doubted.push(key);
            } else {
                neighbour.follow_ups = 0;
            }
        }
        if !judgement.doubted.is_empty() {
            judgement.witnesses = self.witnesses();
            if judgement.witnesses.is_empty() {
                // Their silence would say nothing.
                for key in judgement.doubted.drain(..) {
                    if let Some(neighbour) = self.neighbours.get_mut(&key) {
                        neighbour.follow_ups = 0;
                    }
                }
            }
        }
        if unanswered && !self.nobody && self.nobody_answers(now) {
            self.nobody = true;
            judgement.news = true;
        }
        judgement
    }

    /// Those who have answered last, and have no question open.
    fn witnesses(&self) -> Vec<NeighbourKey> {
        let well = self.neighbours.iter().filter(|(_, one)| one.is_well() && one.asked.is_none());
        let mut well: Vec<_> = well.map(|(key, one)| (one.heard, *key)).collect();
        well.sort_unstable_by(|one, other| other.cmp(one));
        well.into_iter().take(WITNESSES).map(|(_, key)| key).collect()
    }

    fn nobody_answers(&self, now: Instant) -> bool {
        let mut asked = self.neighbours.values().filter(|one| one.heard.is_some());
        let quiet = |one: &Neighbour| one.quiet.is_some_and(|since| now >= since + NOBODY);
        asked.all(|one| one.silent.is_some() || quiet(one))
    }

    /// When the next question is to be judged.
    pub(super) fn next(&self) -> Option<Instant> {
        self.open.first().map(|(due, _)| *due)
    }

    /// Whether a neighbour has stopped answering.
    pub(super) fn is_silent(&self, key: NeighbourKey) -> bool {
        self.neighbours.get(&key).is_some_and(|one| one.silent.is_some())
    }

    /// Whether of all those that used to answer nobody does.
    pub(super) fn nobody(&self) -> bool {
        self.nobody
    }

    /// Forgets those that are not needed.
    pub(super) fn keep(&mut self, needed: impl Fn(NeighbourKey) -> bool) {
        self.neighbours.retain(|key, _| needed(*key));
        self.open.retain(|(_, key)| needed(*key));
        self.nobody &= self.neighbours.values().any(|one| one.heard.is_some());
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use super::*;

    /// From one question in turn to the next, as with few neighbours.
    const ROUND: Duration = Duration::from_millis(600);
    const MS: Duration = Duration::from_millis(1);

    fn key(n: u32) -> NeighbourKey {
        NeighbourKey { ifindex: 1, address: IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + n)) }
    }

    /// A host that asks `all` in turn, and what its neighbours do.
    struct Host {
        silence: Silence,
        now: Instant,
        begun: Instant,
        all: Vec<NeighbourKey>,
        dead: Vec<NeighbourKey>,
        /// The loop comes by only so often.
        pace: Duration,
        questions: usize,
    }

    impl Host {
        fn new(neighbours: u32) -> Self {
            let now = Instant::now();
            let all: Vec<_> = (1..=neighbours).map(key).collect();
            let (silence, dead) = (Silence::default(), Vec::new());
            let mut host = Self { silence, now, begun: now, all, dead, pace: MS, questions: 0 };
            host.pass(ROUND);
            host
        }

        fn ask(&mut self, key: NeighbourKey) {
            self.questions += 1;
            self.silence.asked(key, self.now);
            if !self.dead.contains(&key) {
                self.silence.answered(key, self.now);
            }
        }

        /// Lets time pass. All are asked in turn, spread over a round.
        fn pass(&mut self, time: Duration) {
            let end = self.now + time;
            while self.now < end {
                let before = self.now - self.begun;
                self.now += self.pace;
                let after = self.now - self.begun;
                for (n, key) in self.all.clone().into_iter().enumerate() {
                    let place = ROUND * n as u32 / self.all.len() as u32;
                    let turns = |at: Duration| {
                        at.checked_sub(place).map(|at| at.as_millis() / ROUND.as_millis())
                    };
                    if turns(before) != turns(after) {
                        self.ask(key);
                    }
                }
                let Judgement { doubted, witnesses, .. } = self.silence.judge(self.now, 50);
                doubted.into_iter().chain(witnesses).for_each(|key| self.ask(key));
            }
        }

        fn silent(&self) -> Vec<NeighbourKey> {
            self.all.iter().copied().filter(|key| self.silence.is_silent(*key)).collect()
        }
    }

    #[test]
    fn one_that_dies_is_silent_within_a_second_whenever_that_is() {
        for others in [2, 3, 7, 40] {
            for at in (0..600).step_by(37) {
                let mut host = Host::new(others);
                host.pass(ROUND + MS * at);
                assert_eq!(host.silent(), []);
                host.dead = vec![key(2)];
                let died = host.now;
                while host.silent().is_empty() {
                    host.pass(MS);
                    assert!(host.now < died + ROUND * 2, "{others} others, {at} ms");
                }
                assert_eq!(host.silent(), [key(2)]);
                let took = host.now - died;
                assert!(took > GRACE * QUESTIONS && took < Duration::from_secs(1), "{took:?}");
                assert!(!host.silence.nobody());
                host.pass(ROUND * 2);
                host.dead.clear();
                host.pass(ROUND);
                assert_eq!(host.silent(), [], "its first answer");
            }
        }
    }

    #[test]
    fn nobody_is_silent_while_nobody_answers() {
        let mut host = Host::new(12);
        host.dead = host.all.clone();
        let before = host.questions;
        host.pass(ROUND * 20);
        assert_eq!(host.silent(), []);
        assert!(host.silence.nobody(), "but it is said");
        let asked = host.questions - before;
        assert!(asked < 12 * 30, "{asked} questions while there is nothing to learn");
        // Some come back: the others have their questions again, and then are silent.
        host.dead.retain(|key| key.address > self::key(4).address);
        host.pass(ROUND);
        assert!(!host.silence.nobody());
        host.pass(Duration::from_secs(1));
        assert_eq!(host.silent(), host.dead);
    }

    #[test]
    fn all_coming_back_together_are_not_silent_for_a_moment() {
        for pause in (0..1200).step_by(113) {
            let mut host = Host::new(5);
            host.dead = host.all.clone();
            host.pass(ROUND * 3 + MS * pause);
            host.dead.clear();
            for _ in 0..1500 {
                host.pass(MS);
                assert_eq!(host.silent(), [], "{pause}");
            }
        }
    }

    #[test]
    fn one_alone_is_not_silent_and_not_asked_more_than_in_its_turn() {
        let mut host = Host::new(1);
        host.dead = vec![key(1)];
        let before = host.questions;
        host.pass(ROUND * 10);
        assert_eq!((host.silent(), host.questions - before), (vec![], 10));
        assert!(host.silence.nobody());
        assert!(host.silence.answered(key(1), host.now) && !host.silence.nobody());
    }

    #[test]
    fn a_host_without_time_takes_nobody_for_silent() {
        let mut host = Host::new(10);
        host.dead = vec![key(2)];
        host.pace = GRACE + LATE;
        host.pass(Duration::from_secs(10));
        assert_eq!(host.silent(), []);
        // It stands still for long, with every question open, and answers come with a delay.
        let mut host = Host::new(10);
        (1..=10).for_each(|n| host.silence.asked(key(n), host.now));
        host.now += Duration::from_secs(10);
        let judgement = host.silence.judge(host.now, 50);
        assert!(!judgement.news);
        host.pass(ROUND * 2);
        assert_eq!(host.silent(), []);
    }

    #[test]
    fn one_that_never_answered_a_question_is_not_silent() {
        let mut host = Host::new(3);
        host.all.push(key(4));
        host.dead.push(key(4));
        host.pass(ROUND * 20);
        assert_eq!(host.silent(), []);
        assert!(!host.silence.nobody());
    }

    #[test]
    fn one_whose_checks_pass_is_not_silent() {
        let mut host = Host::new(3);
        host.dead = vec![key(1)];
        // It has left two questions of four without an answer.
        host.pass(ROUND + GRACE * 3 + MS);
        assert!(!host.silence.alive(key(1)), "no news: it has not been silent yet");
        host.pass(GRACE * 3);
        assert_eq!(host.silent(), [], "it is given its questions anew");
        host.pass(GRACE);
        assert_eq!(host.silent(), [key(1)]);
        // The next check: it lives and does not answer. That is not asked twice.
        assert!(host.silence.alive(key(1)));
        host.pass(ROUND * 10);
        assert_eq!(host.silent(), []);
        // Until it answers again.
        host.dead.clear();
        host.pass(ROUND);
        host.dead = vec![key(1)];
        host.pass(Duration::from_secs(1));
        assert_eq!(host.silent(), [key(1)]);
    }

    #[test]
    fn one_that_only_took_its_time_is_given_more() {
        let silent_after = |host: &mut Host| {
            host.dead = vec![key(1)];
            let died = host.now;
            while host.silent().is_empty() {
                host.pass(MS);
            }
            host.now - died
        };
        let mut host = Host::new(3);
        let first = silent_after(&mut host);
        assert!(first < Duration::from_secs(1), "{first:?}");
        // An answer that was on its way.
        host.dead.clear();
        assert!(host.silence.answered(key(1), host.now));
        let second = silent_after(&mut host);
        assert!(second >= GRACE * (QUESTIONS * 2), "{second:?}");
        // One that was away for longer after all was rightly taken for silent.
        host.pass(TOO_SOON);
        host.dead.clear();
        host.pass(ROUND);
        assert!(silent_after(&mut host) < Duration::from_secs(1));
    }

    #[test]
    fn of_thousands_in_doubt_few_are_asked_at_once_and_nothing_is_kept_of_others() {
        let mut host = Host::new(3000);
        host.pace = MS * 10;
        host.dead = host.all[..2000].to_vec();
        let (now, mut silence) = (host.now, host.silence.clone());
        (1..=3000).for_each(|n| silence.asked(key(n), now));
        (2001..=3000).for_each(|n| assert!(!silence.answered(key(n), now)));
        let judgement = silence.judge(now + GRACE, 50);
        assert_eq!((judgement.doubted.len(), judgement.witnesses.len()), (50, WITNESSES));
        host.pass(Duration::from_secs(4));
        assert_eq!(host.silent().len(), 2000);
        host.silence.keep(|_| false);
        assert_eq!((host.silence.next(), host.silence.neighbours.len()), (None, 0));
        assert!(!host.silence.answered(key(1), host.now) && !host.silence.alive(key(1)));
    }
}
