// The time as the server has it: the clock of the browser's machine may be minutes apart, and what is shown are ages.

let ahead = 0; // seconds by which the server's clock is

/** The server has told what time it is, in seconds since the epoch. */
export function hearTime(server: number): void {
  ahead = server - Date.now() / 1000;
}

/** Seconds since the epoch, by the server's clock. */
export function serverNow(): number {
  return Date.now() / 1000 + ahead;
}
