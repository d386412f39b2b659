//! `%START_TIME(..)%`: strftime's letters, and Envoy's for parts of a second. Always UTC, as in Envoy.

use std::{
    cell::RefCell,
    io::Write as _,
    time::{Duration, SystemTime},
};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// A compiled time format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TimeFormat(Vec<Part>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    /// A strftime letter of the table in `write_letter`.
    Letter(char),
    /// So many digits of the part of the second.
    Fraction(usize),
    /// The second, a dot, and so many digits.
    SecondWithFraction(usize),
}

/// Every letter that `write_letter` knows.
const LETTERS: &str = "YmdHMSsyjeIpbBaAZzFTDR";

impl TimeFormat {
    /// Compiles `text`; the error names the letter that is not known.
    pub(super) fn parse(text: &str) -> Result<TimeFormat, String> {
        let mut parts = Vec::new();
        let mut plain = String::new();
        let mut chars = text.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                plain.push(c);
                continue;
            }
            let part = match chars.next() {
                Some('%') => {
                    plain.push('%');
                    continue;
                }
                Some('f') => Part::Fraction(9),
                Some(digit @ '1'..='9') => match chars.next() {
                    Some('f') => Part::Fraction(digit as usize - '0' as usize),
                    _ => return Err(format!("%{digit} is known as %{digit}f only")),
                },
                Some('E') => match (chars.next(), chars.next()) {
                    (Some(digit @ '1'..='9'), Some('S')) => Part::SecondWithFraction(digit as usize - '0' as usize),
                    _ => return Err("%E is known as %E1S to %E9S only".into()),
                },
                Some(letter) if LETTERS.contains(letter) => Part::Letter(letter),
                Some(other) => return Err(format!("%{other} is not a known part of a time")),
                None => return Err("the time format ends in a single %".into()),
            };
            if !plain.is_empty() {
                parts.push(Part::Text(std::mem::take(&mut plain)));
            }
            parts.push(part);
        }
        if !plain.is_empty() {
            parts.push(Part::Text(plain));
        }
        Ok(TimeFormat(parts))
    }

    /// Appends the time.
    pub(super) fn write(&self, out: &mut Vec<u8>, time: SystemTime) {
        let since_epoch = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
        let civil = Civil::new(since_epoch.as_secs());
        for part in &self.0 {
            match part {
                Part::Text(text) => out.extend_from_slice(text.as_bytes()),
                Part::Letter(letter) => civil.write_letter(out, *letter),
                Part::Fraction(digits) => write_fraction(out, since_epoch.subsec_nanos(), *digits),
                Part::SecondWithFraction(digits) => {
                    civil.write_letter(out, 'S');
                    out.push(b'.');
                    write_fraction(out, since_epoch.subsec_nanos(), *digits);
                }
            }
        }
    }
}

thread_local! {
    /// The second that was last written by `write_default`, and its text.
    static LAST: RefCell<(u64, Vec<u8>)> = const { RefCell::new((u64::MAX, Vec::new())) };
}

/// Appends the time as `2026-01-31T23:59:59.123Z`. All lines of a second share its text.
pub(super) fn write_default(out: &mut Vec<u8>, time: SystemTime) {
    let since_epoch = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    LAST.with_borrow_mut(|(second, text)| {
        if *second != since_epoch.as_secs() {
            *second = since_epoch.as_secs();
            text.clear();
            let civil = Civil::new(*second);
            civil.write_letter(text, 'F');
            text.push(b'T');
            civil.write_letter(text, 'T');
            text.push(b'.');
        }
        out.extend_from_slice(text);
    });
    write_fraction(out, since_epoch.subsec_nanos(), 3);
    out.push(b'Z');
}

fn write_fraction(out: &mut Vec<u8>, nanos: u32, digits: usize) {
    let mut divisor = 100_000_000;
    for _ in 0..digits {
        out.push(b'0' + (nanos / divisor % 10) as u8);
        divisor /= 10;
    }
}

/// A second of the calendar.
struct Civil {
    epoch: u64,
    year: u64,
    month: u64,
    day: u64,
    day_of_year: u64,
    weekday: u64,
    hour: u64,
    minute: u64,
    second: u64,
}

impl Civil {
    fn new(epoch: u64) -> Civil {
        let days = epoch / 86_400;
        // Howard Hinnant's civil_from_days: years begin in March, so that a leap day is a year's last.
        let z = days + 719_468;
        let day_of_era = z % 146_097;
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let from_march = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted = (5 * from_march + 2) / 153;
        let day = from_march - (153 * shifted + 2) / 5 + 1;
        let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
        let year = year_of_era + z / 146_097 * 400 + u64::from(month <= 2);
        let leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
        let before_month = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334][month as usize - 1];
        Civil {
            epoch,
            year,
            month,
            day,
            day_of_year: before_month + day + u64::from(leap && month > 2),
            // 1 January 1970 was a Thursday.
            weekday: (days + 4) % 7,
            hour: epoch / 3600 % 24,
            minute: epoch / 60 % 60,
            second: epoch % 60,
        }
    }

    fn write_letter(&self, out: &mut Vec<u8>, letter: char) {
        let Civil { year, month, day, hour, minute, second, .. } = *self;
        let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[self.weekday as usize]);
        // Writing to a Vec cannot fail.
        let _ = match letter {
            'Y' => write!(out, "{year}"),
            'm' => write!(out, "{month:02}"),
            'd' => write!(out, "{day:02}"),
            'H' => write!(out, "{hour:02}"),
            'M' => write!(out, "{minute:02}"),
            'S' => write!(out, "{second:02}"),
            's' => write!(out, "{}", self.epoch),
            'y' => write!(out, "{:02}", year % 100),
            'j' => write!(out, "{:03}", self.day_of_year),
            'e' => write!(out, "{day:2}"),
            'I' => write!(out, "{:02}", (hour + 11) % 12 + 1),
            'p' => write!(out, "{}", if hour < 12 { "AM" } else { "PM" }),
            'b' => write!(out, "{}", &month_name[..3]),
            'B' => write!(out, "{month_name}"),
            'a' => write!(out, "{}", &day_name[..3]),
            'A' => write!(out, "{day_name}"),
            'Z' => write!(out, "UTC"),
            'z' => write!(out, "+0000"),
            'F' => write!(out, "{year}-{month:02}-{day:02}"),
            'T' => write!(out, "{hour:02}:{minute:02}:{second:02}"),
            'D' => write!(out, "{month:02}/{day:02}/{:02}", year % 100),
            'R' => write!(out, "{hour:02}:{minute:02}"),
            // `parse` lets no other letter through.
            _ => Ok(()),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64, nanos: u32) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::new(seconds, nanos)
    }

    fn format(format: &str, time: SystemTime) -> String {
        let mut out = Vec::new();
        TimeFormat::parse(format).unwrap().write(&mut out, time);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn writes_what_envoy_writes() {
        // A line of the real Envoy.
        assert_eq!(
            format(
                "%Y/%m/%d %H:%M:%S.%3f %s %f %6f %b %a %j %y %e %I %p %F %T %Z %z %E3S %E9S %D",
                at(1_795_238_553, 59_026_000)
            ),
            "2026/11/21 05:22:33.059 1795238553 059026000 059026 Nov Sat 325 26 21 05 AM 2026-11-21 05:22:33 UTC +0000 \
             33.059 33.059026000 11/21/26"
        );
    }

    #[test]
    fn knows_the_calendar() {
        for (seconds, text) in [
            (0, "Thursday 1970-01-01 001 00:00 12AM"),
            (951_782_400, "Tuesday 2000-02-29 060 00:00 12AM"),
            (978_264_000, "Sunday 2000-12-31 366 12:00 12PM"),
            (1_709_251_199, "Thursday 2024-02-29 060 23:59 11PM"),
            (1_709_251_200, "Friday 2024-03-01 061 00:00 12AM"),
            (4_107_542_400, "Monday 2100-03-01 060 00:00 12AM"),
        ] {
            assert_eq!(format("%A %F %j %R %I%p", at(seconds, 0)), text);
        }
    }

    #[test]
    fn the_default_is_iso_8601_with_milliseconds() {
        let mut out = Vec::new();
        for time in [at(1_795_238_553, 59_999_999), at(1_795_238_553, 60_000_000), at(1_795_238_554, 0)] {
            write_default(&mut out, time);
            out.push(b' ');
        }
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "2026-11-21T05:22:33.059Z 2026-11-21T05:22:33.060Z 2026-11-21T05:22:34.000Z "
        );
    }

    #[test]
    fn refuses_what_it_does_not_know() {
        for bad in ["%Q", "%", "%E3X", "%3S", "%Ex"] {
            TimeFormat::parse(bad).unwrap_err();
        }
        assert_eq!(format("100%% %d", at(0, 0)), "100% 01");
    }
}
