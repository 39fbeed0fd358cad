//! `rollout.windows`: times of the week, `Mon-Thu 09:00-16:00 Europe/Berlin`.
//!
//! Owns the notation and what is inside of it, on the clocks of the place that it names.

use jiff::{Timestamp, civil, tz::TimeZone};

use super::scalar::{Problem, nearest, quote};

const DAYS: [&str; 7] = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"];
const DAY_MINUTES: u16 = 24 * 60;
/// A place's clocks are moved on a few nights of a year; two weeks find the next opening.
const LOOK_AHEAD_DAYS: i64 = 15;

/// Hours on some days of the week.
#[derive(Clone, Debug, PartialEq)]
pub struct Opening {
    /// As it was written.
    pub text: String,
    /// From Monday on.
    days: [bool; 7],
    /// Minutes since midnight.
    from: u16,
    /// The same; at most `from` where it ends on the next day.
    until: u16,
    zone: TimeZone,
}

impl Opening {
    /// Reads `DAYS FROM-UNTIL [ZONE]`.
    pub(super) fn read(text: &str) -> Result<Self, Problem> {
        let bad = |why: String| {
            Problem::with(
                format!("{} is no time of the week: {why}", quote(text)),
                "write days, hours and a time zone, such as `Mon-Thu 09:00-16:00 Europe/Berlin`",
            )
        };
        let words: Vec<&str> = text.split_whitespace().collect();
        let (days, hours, zone) = match words[..] {
            [days, hours] => (days, hours, "UTC"),
            [days, hours, zone] => (days, hours, zone),
            _ => return Err(bad("it has not the form".to_owned())),
        };
        let days = read_days(days).map_err(bad)?;
        let (from, until) =
            hours.split_once('-').ok_or_else(|| bad(format!("{} has no end", quote(hours))))?;
        let (from, until) = (minute(from).map_err(bad)?, minute(until).map_err(bad)?);
        if from == until || from == DAY_MINUTES {
            return Err(bad("it lasts no time".to_owned()));
        }
        let zone = TimeZone::get(zone)
            .map_err(|_| bad(format!("there is no time zone {}", quote(zone))))?;
        Ok(Self { text: text.to_owned(), days, from, until, zone })
    }

    /// Whether a time, in milliseconds since 1970, is inside.
    pub fn holds(&self, unix_ms: u64) -> bool {
        let at = self.local(unix_ms);
        let minute =
            u16::from(at.hour().unsigned_abs()) * 60 + u16::from(at.minute().unsigned_abs());
        let today = usize::from(at.weekday().to_monday_zero_offset().unsigned_abs());
        let yesterday = (today + 6) % 7;
        match self.from < self.until {
            true => self.days[today] && (self.from..self.until).contains(&minute),
            false => {
                self.days[today] && minute >= self.from
                    || self.days[yesterday] && minute < self.until
            }
        }
    }

    /// When it opens next after a time at which it is closed, in milliseconds since 1970.
    pub fn next(&self, unix_ms: u64) -> Option<u64> {
        let today = self.local(unix_ms).date();
        let begin = civil::time((self.from / 60) as i8, (self.from % 60) as i8, 0, 0);
        (0..LOOK_AHEAD_DAYS).find_map(|days| {
            let date = today.checked_add(jiff::Span::new().days(days)).ok()?;
            let weekday = usize::from(date.weekday().to_monday_zero_offset().unsigned_abs());
            if !self.days[weekday] {
                return None;
            }
            let opens = self.zone.to_timestamp(date.to_datetime(begin)).ok()?;
            let opens = u64::try_from(opens.as_millisecond()).ok()?;
            (opens > unix_ms).then_some(opens)
        })
    }

    fn local(&self, unix_ms: u64) -> civil::DateTime {
        let at = i64::try_from(unix_ms).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok());
        self.zone.to_datetime(at.unwrap_or_default())
    }
}

fn read_days(text: &str) -> Result<[bool; 7], String> {
    let mut days = [false; 7];
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (day(first)?, day(last)?);
        let mut at = first;
        loop {
            days[at] = true;
            if at == last {
                break;
            }
            at = (at + 1) % 7;
        }
    }
    Ok(days)
}

fn day(text: &str) -> Result<usize, String> {
    let at = DAYS.iter().position(|day| day.eq_ignore_ascii_case(text));
    at.ok_or_else(|| match nearest(text, DAYS) {
        Some(day) => format!("{} is no day; did you mean `{day}`?", quote(text)),
        None => format!("{} is no day: they are {}", quote(text), DAYS.join(", ")),
    })
}

fn minute(text: &str) -> Result<u16, String> {
    let bad = || format!("{} is no time of day, such as `09:00`", quote(text));
    let digits = |text: &str| text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_digit());
    let (hour, minute) = text.split_once(':').ok_or_else(bad)?;
    if !digits(hour) || !digits(minute) {
        return Err(bad());
    }
    let parse = |text: &str| text.parse::<u16>().ok();
    let (hour, minute) = parse(hour).zip(parse(minute)).ok_or_else(bad)?;
    let sum = hour * 60 + minute;
    if minute > 59 || sum > DAY_MINUTES {
        return Err(bad());
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> u64 {
        text.parse::<Timestamp>().expect(text).as_millisecond() as u64
    }

    #[test]
    fn hours_are_those_of_the_place() {
        let berlin = Opening::read("Mon-Thu 09:00-16:00 Europe/Berlin").expect("one");
        // A Wednesday in winter, and one in summer.
        for (time, inside) in [
            ("2026-01-14T07:59:59Z", false),
            ("2026-01-14T08:00:00Z", true),
            ("2026-01-14T14:59:59Z", true),
            ("2026-01-14T15:00:00Z", false),
            ("2026-07-15T07:00:00Z", true),
            ("2026-07-15T06:59:59Z", false),
            ("2026-01-16T10:00:00Z", false),
        ] {
            assert_eq!(berlin.holds(at(time)), inside, "{time}");
        }
        // From a Friday to the Monday after the clocks were moved.
        assert_eq!(berlin.next(at("2026-03-27T10:00:00Z")), Some(at("2026-03-30T07:00:00Z")));
        assert_eq!(berlin.next(at("2026-01-14T07:00:00Z")), Some(at("2026-01-14T08:00:00Z")));
        assert_eq!(berlin.next(at("2026-01-15T15:00:00Z")), Some(at("2026-01-19T08:00:00Z")));
    }

    #[test]
    fn a_night_belongs_to_the_day_that_it_began_on() {
        let night = Opening::read("Fri 22:00-02:00").expect("one");
        for (time, inside) in [
            ("2026-01-16T21:59:00Z", false),
            ("2026-01-16T22:00:00Z", true),
            ("2026-01-17T01:59:00Z", true),
            ("2026-01-17T02:00:00Z", false),
            ("2026-01-17T23:00:00Z", false),
            ("2026-01-16T01:00:00Z", false),
        ] {
            assert_eq!(night.holds(at(time)), inside, "{time}");
        }
        let week = Opening::read("Sat-Mon,Wed 00:00-24:00 UTC").expect("one");
        let days = (0..7).map(|day| week.holds(at("2026-01-12T12:00:00Z") + day * 86_400_000));
        assert_eq!(days.collect::<Vec<_>>(), [true, false, true, false, false, true, true]);
    }

    #[test]
    fn what_is_no_time_of_the_week_says_why() {
        for (text, why) in [
            ("", "has not the form"),
            ("Mon", "has not the form"),
            ("Monday 09:00-10:00", "did you mean `Mon`?"),
            ("Mon 9-10", "`9` is no time of day"),
            ("Mon 09:00", "has no end"),
            ("Mon 09:00-25:00", "`25:00` is no time of day"),
            ("Mon 09:60-10:00", "`09:60` is no time of day"),
            ("Mon 09:00-09:00", "lasts no time"),
            ("Mon 09:00-10:00 Europe/Brelin", "no time zone `Europe/Brelin`"),
        ] {
            let problem = Opening::read(text).expect_err(text);
            assert!(problem.message.contains(why), "{text}: {problem:?}");
        }
    }
}
