use std::fmt::Write as _;

use culvert_xds_client::json;
use envoy_types::pb::google::protobuf::{Struct, Value, value::Kind};

/// `FractionalPercent`: a share of all requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fraction {
    /// At least the denominator: always.
    pub numerator: u32,
    /// Of how many.
    pub denominator: Denominator,
}

impl Fraction {
    /// So many of a hundred.
    pub const fn percent(numerator: u32) -> Fraction {
        Fraction { numerator, denominator: Denominator::Hundred }
    }

    /// Whether this random number is among the chosen ones.
    #[inline]
    pub fn includes(self, random: u64) -> bool {
        random % self.denominator.value() < u64::from(self.numerator)
    }
}

/// `FractionalPercent.DenominatorType`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Denominator {
    /// 100
    Hundred,
    /// 10,000
    TenThousand,
    /// 1,000,000
    Million,
}

impl Denominator {
    /// The number.
    pub const fn value(self) -> u64 {
        match self {
            Denominator::Hundred => 100,
            Denominator::TenThousand => 10_000,
            Denominator::Million => 1_000_000,
        }
    }
}

/// One value of one layer: its text, as `/runtime` shows it, and what it means to those who ask for a type. What it does
/// not mean is `None`, and whoever asks takes a default.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Entry {
    /// The text.
    pub raw: String,
    /// As a whole number: a fraction is cut off, a negative number is none.
    pub integer: Option<u64>,
    /// As a number.
    pub double: Option<f64>,
    /// As a truth value: booleans, and whole numbers (0 is false).
    pub boolean: Option<bool>,
    /// As a `FractionalPercent`: objects of `numerator` and `denominator` only.
    pub fraction: Option<Fraction>,
}

impl Entry {
    /// A value of a file or of `/runtime_modify`: YAML, whose text is shown as it is.
    ///
    /// # Errors
    /// The text is not YAML.
    pub fn from_text(text: &str) -> Result<Entry, String> {
        let blank = text.lines().all(|line| line.trim().is_empty() || line.trim_start().starts_with('#'));
        let value = if blank {
            Value { kind: Some(Kind::NullValue(0)) }
        } else {
            json::from_yaml::<Value>(text).map_err(|error| error.to_string())?
        };
        Ok(Entry::new(&value, Some(text)))
    }

    /// A value of a static layer or of RTDS; `None` for lists and nulls, which are no values.
    pub fn from_value(value: &Value) -> Option<Entry> {
        match value.kind {
            None | Some(Kind::NullValue(_) | Kind::ListValue(_)) => None,
            Some(_) => Some(Entry::new(value, None)),
        }
    }

    fn new(value: &Value, text: Option<&str>) -> Entry {
        let raw = |other: &dyn Fn() -> String| text.map_or_else(other, str::to_owned);
        let mut entry = Entry::default();
        match &value.kind {
            Some(Kind::NumberValue(number)) => {
                entry.raw = raw(&|| six_digits(*number));
                entry.set_number(*number);
            }
            Some(Kind::BoolValue(value)) => {
                entry.raw = raw(&|| value.to_string());
                entry.boolean = Some(*value);
            }
            Some(Kind::StructValue(fields)) => {
                entry.raw = raw(&|| json::to_json(fields).to_string());
                entry.fraction = fraction(fields);
            }
            Some(Kind::StringValue(string)) => {
                entry.raw = raw(&|| string.clone());
                // What YAML takes for a string may be a number all the same: `2.5`, or what has more than 32 bits.
                if let Some(number) = number(&entry.raw) {
                    entry.set_number(number);
                }
            }
            None | Some(Kind::NullValue(_) | Kind::ListValue(_)) => entry.raw = raw(&String::new),
        }
        entry
    }

    fn set_number(&mut self, number: f64) {
        self.double = Some(number);
        if number.trunc() == number && number.abs() < f64::from(i32::MAX) {
            self.boolean = Some(number != 0.0);
        }
        // 2^64 itself is taken by Envoy as well.
        if (0.0..=u64::MAX as f64).contains(&number) {
            self.integer = Some(number as u64);
        }
    }
}

/// A number as `absl::SimpleAtod` reads it.
fn number(text: &str) -> Option<f64> {
    let text = text.trim_matches(|c: char| c.is_ascii_whitespace() || c == '\x0b');
    let text = text.strip_prefix('+').filter(|rest| !rest.starts_with(['+', '-'])).unwrap_or(text);
    text.parse().ok()
}

/// `FractionalPercent` out of its fields; `None` where there is any other field or value.
fn fraction(fields: &Struct) -> Option<Fraction> {
    let mut fraction = Fraction::percent(0);
    for (name, value) in &fields.fields {
        match (name.as_str(), &value.kind) {
            // Cut off, and taken modulo 2^32, as Envoy's conversion does.
            ("numerator", Some(Kind::NumberValue(number))) => fraction.numerator = *number as i64 as u32,
            ("numerator", _) => {}
            ("denominator", Some(Kind::StringValue(name))) => {
                fraction.denominator = match name.as_str() {
                    "HUNDRED" => Denominator::Hundred,
                    "TEN_THOUSAND" => Denominator::TenThousand,
                    "MILLION" => Denominator::Million,
                    _ => return None,
                }
            }
            _ => return None,
        }
    }
    Some(fraction)
}

/// A number with six significant digits, as Envoy prints those of layers (`%g`).
fn six_digits(number: f64) -> String {
    if number == 0.0 || !number.is_finite() {
        return number.to_string();
    }
    let scientific = format!("{number:.5e}");
    let Some((digits, exponent)) = scientific.split_once('e') else { return scientific };
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..6).contains(&exponent) {
        let places = usize::try_from(5 - exponent).unwrap_or(0);
        return trimmed(&format!("{number:.places$}")).to_owned();
    }
    let mut text = trimmed(digits).to_owned();
    // Writing to a String cannot fail.
    let _ = write!(text, "e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs());
    text
}

/// Without the zeros at the end of a fraction.
fn trimmed(digits: &str) -> &str {
    if digits.contains('.') { digits.trim_end_matches('0').trim_end_matches('.') } else { digits }
}

#[cfg(test)]
#[path = "entry_tests.rs"]
mod tests;
