//! A share of a service's buckets: as it is written, and as buckets.

use std::{cmp::Ordering, fmt, str::FromStr};

/// An exact fraction from 0 to 1.
///
/// Written in percent (`5%`, `0.1%`, `12.5 %`) or as a number of buckets
/// (`64/65536`); shown as it was written.
///
/// ```
/// use canary_ebpf_common::share::Share;
/// let share: Share = "0.1%".parse()?;
/// assert_eq!(share.buckets(65_536), 66);
/// assert_eq!("64/65536".parse::<Share>()?.buckets(65_536), 64);
/// assert!("5".parse::<Share>().is_err());
/// # Ok::<(), canary_ebpf_common::share::ShareError>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Share {
    numerator: u64,
    denominator: u64,
    form: Form,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Percent,
    Buckets,
}

/// Why a text is no share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ShareError {
    /// A number without a unit.
    NoPercentSign(String),
    /// More than the whole.
    AboveWhole(String),
    /// Below zero.
    Negative(String),
    /// More than nine digits after the point, or numbers beyond reason.
    TooPrecise(String),
    /// Anything else.
    NotAShare(String),
}

impl fmt::Display for ShareError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoPercentSign(text) => {
                write!(
                    f,
                    "`{text}` has no unit: write `{text}%` for percent, or buckets as `64/65536`"
                )
            }
            Self::AboveWhole(text) => write!(f, "`{text}` is more than 100%"),
            Self::Negative(text) => write!(f, "`{text}` is below 0%"),
            Self::TooPrecise(text) => {
                write!(f, "`{text}` has too many digits: at most nine after the point")
            }
            Self::NotAShare(text) => {
                write!(f, "`{text}` is not a share: write percent as `5%` or buckets as `64/65536`")
            }
        }
    }
}

impl std::error::Error for ShareError {}

/// Denominator of one percent with nine decimals.
const PERCENT: u64 = 100 * 1_000_000_000;
/// The fewest buckets that a share is written in; every other number of them is a multiple.
const MIN_BUCKETS: u128 = 1 << 12;
/// The most buckets that a share is written in.
const BUCKETS: u128 = 1 << 20;

impl Share {
    /// Nothing.
    pub const ZERO: Self = Self { numerator: 0, denominator: PERCENT, form: Form::Percent };
    /// The whole.
    pub const ALL: Self = Self { numerator: PERCENT, denominator: PERCENT, form: Form::Percent };

    /// `count` of `total` buckets, which are a power of two from 4,096 to 1,048,576. More than all
    /// are all.
    pub fn of_buckets(count: u32, total: u32) -> Self {
        debug_assert!(
            total.is_power_of_two() && (MIN_BUCKETS..=BUCKETS).contains(&u128::from(total))
        );
        let numerator = u64::from(count.min(total));
        Self { numerator, denominator: u64::from(total), form: Form::Buckets }
    }

    /// The number of `total` buckets nearest to the share; a share above 0 has at least one,
    /// and a share below the whole leaves at least one.
    ///
    /// `total` is at least 2.
    pub const fn buckets(self, total: u32) -> u32 {
        let (n, d) = (self.numerator as u128, self.denominator as u128);
        if n == 0 {
            return 0;
        }
        if n == d {
            return total;
        }
        let rounded = ((2 * n * total as u128 + d) / (2 * d)) as u32;
        if rounded == 0 {
            1
        } else if rounded >= total {
            total - 1
        } else {
            rounded
        }
    }

    /// As a fraction of 1.
    pub fn fraction(self) -> f64 {
        self.numerator as f64 / self.denominator as f64
    }

    /// Whether `shares` together are at most the whole.
    pub fn fit_together(shares: impl IntoIterator<Item = Self>) -> bool {
        let (percent, buckets) = sums(shares);
        percent * BUCKETS + buckets * u128::from(PERCENT) <= u128::from(PERCENT) * BUCKETS
    }

    /// What `shares` leave of the whole: nothing where they are more. Exact and in their form, if
    /// all have one; else in percent, rounded down to what can be written.
    pub fn rest(shares: impl IntoIterator<Item = Self>) -> Self {
        let (percent, buckets) = sums(shares);
        if percent == 0 && buckets > 0 {
            let left = BUCKETS.saturating_sub(buckets);
            // Both are powers of two, or 0: no smaller denominator than tables may have.
            let excess = left.trailing_zeros().min((BUCKETS / MIN_BUCKETS).trailing_zeros());
            return Self {
                numerator: (left >> excess) as u64,
                denominator: (BUCKETS >> excess) as u64,
                form: Form::Buckets,
            };
        }
        let taken = percent + (buckets * u128::from(PERCENT)).div_ceil(BUCKETS);
        let left = u128::from(PERCENT).saturating_sub(taken);
        Self { numerator: left as u64, denominator: PERCENT, form: Form::Percent }
    }
}

/// The sum of the shares in percent, in [`PERCENT`]ths, and of those in buckets, in
/// [`BUCKETS`]ths: denominators are the one or divide the other, so both are exact.
fn sums(shares: impl IntoIterator<Item = Share>) -> (u128, u128) {
    shares.into_iter().fold((0, 0), |(percent, buckets), share| {
        let numerator = u128::from(share.numerator);
        match share.form {
            Form::Percent => (percent + numerator, buckets),
            Form::Buckets => {
                (percent, buckets + numerator * (BUCKETS / u128::from(share.denominator)))
            }
        }
    })
}

impl PartialEq for Share {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Share {}

impl PartialOrd for Share {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Share {
    fn cmp(&self, other: &Self) -> Ordering {
        (u128::from(self.numerator) * u128::from(other.denominator))
            .cmp(&(u128::from(other.numerator) * u128::from(self.denominator)))
    }
}

impl FromStr for Share {
    type Err = ShareError;

    fn from_str(text: &str) -> Result<Self, ShareError> {
        let trimmed = text.trim();
        let bad = || ShareError::NotAShare(trimmed.to_owned());
        if let Some(magnitude) = trimmed.strip_prefix('-') {
            return Err(match magnitude.starts_with(|c: char| c.is_ascii_digit()) {
                true => ShareError::Negative(trimmed.to_owned()),
                false => bad(),
            });
        }
        if let Some((numerator, denominator)) = trimmed.split_once('/') {
            let numerator = whole(numerator).ok_or_else(bad)?;
            let denominator = whole(denominator).ok_or_else(bad)?;
            if !denominator.is_power_of_two()
                || !(MIN_BUCKETS..=BUCKETS).contains(&u128::from(denominator))
            {
                return Err(bad());
            }
            if numerator > denominator {
                return Err(ShareError::AboveWhole(trimmed.to_owned()));
            }
            return Ok(Self { numerator, denominator, form: Form::Buckets });
        }
        let Some(number) = trimmed.strip_suffix('%') else {
            return Err(match trimmed.parse::<f64>() {
                Ok(value) if value.is_finite() => ShareError::NoPercentSign(trimmed.to_owned()),
                _ => bad(),
            });
        };
        let number = number.trim_end();
        let (integer, decimals) = number.split_once('.').unwrap_or((number, "0"));
        if decimals.len() > 9 && digits(decimals) {
            return Err(ShareError::TooPrecise(trimmed.to_owned()));
        }
        if !digits(integer) || !digits(decimals) {
            return Err(bad());
        }
        let above = || ShareError::AboveWhole(trimmed.to_owned());
        let integer = whole(integer).ok_or_else(above)?;
        let scale = 10_u64.pow(9 - decimals.len() as u32);
        let numerator = integer
            .checked_mul(1_000_000_000)
            .and_then(|n| n.checked_add(whole(decimals)? * scale))
            .ok_or_else(above)?;
        if numerator > PERCENT {
            return Err(above());
        }
        Ok(Self { numerator, denominator: PERCENT, form: Form::Percent })
    }
}

fn digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

/// A decimal number of at most 18 digits.
fn whole(text: &str) -> Option<u64> {
    let text = text.trim();
    (digits(text) && text.len() <= 18).then(|| text.parse().ok()).flatten()
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.form {
            Form::Buckets => write!(f, "{}/{}", self.numerator, self.denominator),
            Form::Percent => {
                let (integer, rest) =
                    (self.numerator / 1_000_000_000, self.numerator % 1_000_000_000);
                if rest == 0 {
                    write!(f, "{integer}%")
                } else {
                    write!(f, "{integer}.{}%", format!("{rest:09}").trim_end_matches('0'))
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn share(text: &str) -> Share {
        text.parse().unwrap_or_else(|e| panic!("{text}: {e}"))
    }

    #[test]
    fn percent_and_buckets_are_read_exactly() {
        for (text, buckets) in [
            ("0%", 0),
            ("100%", 65_536),
            ("5%", 3_277),
            ("0.1%", 66),
            ("12.5 %", 8_192),
            ("50%", 32_768),
            ("64/65536", 64),
            ("0/65536", 0),
            ("4096/4096", 65_536),
            (" 1% ", 655),
        ] {
            assert_eq!(share(text).buckets(65_536), buckets, "{text}");
        }
    }

    #[test]
    fn what_is_no_share_says_why() {
        for (text, error) in [
            ("5", "has no unit"),
            ("0.05", "has no unit"),
            ("101%", "more than 100%"),
            ("100.000000001%", "more than 100%"),
            ("99999999999999999999999%", "more than 100%"),
            ("65537/65536", "more than 100%"),
            ("-1%", "below 0%"),
            ("NaN%", "not a share"),
            ("NaN", "not a share"),
            ("inf", "not a share"),
            ("", "not a share"),
            ("%", "not a share"),
            ("1e1%", "not a share"),
            ("+5%", "not a share"),
            ("1/0", "not a share"),
            ("1/3", "not a share"),
            ("1.%", "not a share"),
            (".5%", "not a share"),
            ("--5%", "not a share"),
            ("0.0000000001%", "too many digits"),
        ] {
            let message = text.parse::<Share>().expect_err(text).to_string();
            assert!(message.contains(error), "{text}: {message}");
        }
    }

    #[test]
    fn sums_are_exact() {
        let thirds = ["33.333333333%", "33.333333333%", "33.333333334%"].map(share);
        assert!(Share::fit_together(thirds));
        assert!(!Share::fit_together(thirds.into_iter().chain([share("1/65536")])));
        assert!(Share::fit_together([share("50%"), share("32768/65536")]));
        assert!(!Share::fit_together([share("50%"), share("32769/65536")]));
    }

    #[test]
    fn what_is_left_is_written_as_the_others_are() {
        for (shares, rest) in [
            (&["21%"][..], "79%"),
            (&["33.333333333%", "0.1%"], "66.566666667%"),
            (&["64/65536"], "4092/4096"),
            (&["1/65536", "3/8192"], "65511/65536"),
            (&["4096/4096"], "0/4096"),
            (&["100%"], "0%"),
            (&["60%", "60%"], "0%"),
            (&[], "100%"),
            // 3/65536 are 0.00457763671875 %.
            (&["50%", "3/65536"], "49.995422363%"),
        ] {
            let shares = shares.iter().map(|text| share(text));
            let left = Share::rest(shares.clone());
            assert_eq!(left.to_string(), rest);
            assert!(
                !Share::fit_together(shares.clone()) || Share::fit_together(shares.chain([left]))
            );
        }
    }

    proptest! {
        #[test]
        fn a_share_between_nothing_and_all_is_neither(numerator in 1..PERCENT, bits in 12..=20_u32) {
            let share = Share { numerator, denominator: PERCENT, form: Form::Percent };
            let total = 1 << bits;
            let buckets = share.buckets(total);
            prop_assert!(0 < buckets && buckets < total);
            let exact = share.fraction() * f64::from(total);
            prop_assert!((f64::from(buckets) - exact).abs() <= 1.0);
        }

        #[test]
        fn what_is_shown_reads_back(numerator in 0..=PERCENT) {
            let share = Share { numerator, denominator: PERCENT, form: Form::Percent };
            prop_assert_eq!(share, share.to_string().parse().unwrap());
        }
    }
}
