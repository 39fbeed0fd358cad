//! The statistic once more, from its definition: in whole numbers of any size, window by
//! window, with θ and all powers as they are written. Nothing of the agent's own reckoning is
//! in it.

use num_bigint::{BigInt, BigUint};
use num_rational::BigRational;
use num_traits::{One, Pow, ToPrimitive, Zero};

/// A window: share, bad events on control and on the canary.
pub(crate) type Row = (f64, u32, u32);

/// A positive fraction that is not reduced: to look for common divisors would take longer than
/// all the rest.
pub(crate) struct Fraction {
    top: BigUint,
    bottom: BigUint,
}

pub(crate) fn fraction(numerator: i64, denominator: i64) -> BigRational {
    BigRational::new(numerator.into(), denominator.into())
}

/// The fraction that a floating-point number is.
pub(crate) fn of(value: f64) -> BigRational {
    BigRational::from_float(value).expect("finite")
}

fn parts(value: &BigRational) -> (BigUint, BigUint) {
    let natural = |number: &BigInt| number.to_biguint().expect("not negative");
    (natural(value.numer()), natural(value.denom()))
}

/// E for null `null` and `null · multiples`, in equal parts.
pub(crate) fn statistic(null: &BigRational, multiples: &[BigRational], rows: &[Row]) -> Fraction {
    // θ is the first over the sum of both, and 1 − θ the second over it.
    let odds = |share: f64, ratio: &BigRational| {
        let ((a, b), (c, d)) = (parts(&of(share)), parts(ratio));
        let rest = &b - &a;
        (a * c, rest * d)
    };
    let products = multiples.iter().map(|multiple| {
        let ratio = null * multiple;
        let mut product = Fraction { top: BigUint::one(), bottom: BigUint::one() };
        for &(share, control, canary) in rows {
            let (from, to) = (odds(share, null), odds(share, &ratio));
            let (from_both, to_both) = (&from.0 + &from.1, &to.0 + &to.1);
            product.top *= Pow::pow(&to.0 * &from_both, canary);
            product.bottom *= Pow::pow(&from.0 * &to_both, canary);
            product.top *= Pow::pow(&to.1 * &from_both, control);
            product.bottom *= Pow::pow(&from.1 * &to_both, control);
        }
        product
    });
    let sum = products.reduce(|sum, one| Fraction {
        top: &sum.top * &one.bottom + &one.top * &sum.bottom,
        bottom: sum.bottom * one.bottom,
    });
    let Fraction { top, bottom } = sum.expect("an alternative");
    Fraction { top, bottom: bottom * multiples.len() }
}

/// The same, reduced.
pub(crate) fn reduced(Fraction { top, bottom }: Fraction) -> BigRational {
    BigRational::new(top.into(), bottom.into())
}

/// The natural logarithm, to the digits that a floating-point number has.
pub(crate) fn ln(value: &Fraction) -> f64 {
    // The quotient first, to 200 bits: the difference of two large logarithms has fewer digits.
    let bits = |number: &BigUint| i64::try_from(number.bits()).expect("fits");
    let shift = 200 + bits(&value.bottom) - bits(&value.top);
    let by = shift.unsigned_abs();
    let quotient = match shift >= 0 {
        true => (&value.top << by) / &value.bottom,
        false => &value.top / (&value.bottom << by),
    };
    assert!(!quotient.is_zero());
    quotient.to_f64().expect("fits").ln() - shift as f64 * std::f64::consts::LN_2
}

/// What a canary is suspected of, as the design has it.
pub(crate) fn worse() -> Vec<BigRational> {
    [(3, 2), (2, 1), (3, 1), (5, 1), (10, 1)].map(|(n, d)| fraction(n, d)).to_vec()
}

/// What it is hoped for.
pub(crate) fn better() -> Vec<BigRational> {
    [(2, 3), (1, 2), (1, 3), (1, 5), (1, 10)].map(|(n, d)| fraction(n, d)).to_vec()
}
