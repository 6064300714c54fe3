/** Of this front end; that of the server extension must be the same. */
export const VERSION = '0.1.0';
